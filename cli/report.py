"""`python report.py`: compare finished runs."""

from pathlib import Path

USAGE = """\
Compare finished runs: quality, time and memory, with significance tests and caveats.
Writes report.html, report.md, results.csv, results.json and figures/ into the first folder.

  python report.py DIR... [baseline="attn=A pos=P"]

DIR is a sweep folder, a run folder, or a folder that contains some.

Examples
  python report.py outputs/sweeps/grid
  python report.py outputs/runs/one outputs/runs/two baseline="attn=mha pos=learned"
"""


def main(arguments: list[str]) -> int:
    """`python report.py`."""
    if {"-h", "--help"} & set(arguments) or not arguments:
        print(USAGE)
        return 0 if arguments else 2
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    folders = [Path(a) for a in arguments if "=" not in a]
    if unknown := sorted(options.keys() - {"baseline"}):
        raise ValueError(f"{unknown[0]}: no such key; report.py takes folders and baseline=...")
    if not folders:
        raise ValueError("no folder given: name the folder of a sweep or of runs")
    from compare.report.write import write  # pandas and matplotlib take seconds to import

    print(write(folders, options.get("baseline")))
    return 0
