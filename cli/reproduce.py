"""`python -m cli.reproduce`: train a finished run again from its own record, and compare the curves."""

import sys
from pathlib import Path

from cli.entry import run_command
from compare.check.reproduction import reproduce

USAGE = """\
Train a finished run again from what its folder records (config, seed, threads, dtype), and compare
every loss and gradient norm.

  python -m cli.reproduce RUN [to=DIR]       to: folder of the new run; outputs/reproduced/ by default

With the code and the machine of then, every bit has to agree. Elsewhere the losses of the first ten
steps have to agree within 1 %, and the last validation within 0.02 nats. The run's text has to be
there, and the run that it started from. Exit code 1 if it is not reproduced.
"""


def main(arguments: list[str]) -> int:
    """`python -m cli.reproduce`: exit code 1 if the run is not reproduced."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    folders = [Path(a) for a in arguments if "=" not in a]
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    if unknown := options.keys() - {"to"}:
        raise ValueError(f"{min(unknown)}: no such key; known: to")
    if len(folders) != 1:
        raise ValueError(f"reproduces one run at a time, and {len(folders)} are named")
    to = Path(options.get("to") or Path("outputs/reproduced") / folders[0].resolve().name)
    found = reproduce(folders[0], to)
    print(f"\n{folders[0]}: {'' if found.reproduced else 'not '}reproduced: {found.words}")
    return 0 if found.reproduced else 1


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
