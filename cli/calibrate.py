"""`python -m cli.calibrate`: false positives and power of the report's statistics."""

import sys
from pathlib import Path

from cli.entry import run_command
from compare.check.calibration import LEAST, LIMIT, equal, faint, planted
from compare.report.runs import Run, read

USAGE = """\
Calibrate the report's statistics on the runs of experiment=honesty (12 seeds, and 12 with half the
steps), with three checks:
  equal    the seeds of one variant, split at random into two groups: significant in about 5 % of splits
  planted  a variant with half the steps, 5 random seeds: always significant
  faint    one of two equal groups, shifted by two standard deviations of their differences, 5 seeds

  python train.py experiment=honesty
  python -m cli.calibrate [DIR] [splits=1000]
"""


def main(arguments: list[str]) -> int:
    """`python -m cli.calibrate`: exit code 1 if a check fails."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    options = dict(a.split("=", 1) for a in arguments if "=" in a)
    folders = [Path(a) for a in arguments if "=" not in a] or [Path("outputs/sweeps/honesty")]
    splits = int(options.get("splits", "1000"))
    runs = [run for run in read(folders) if run.done]
    by_steps: dict[int, list[Run]] = {}
    for run in runs:
        by_steps.setdefault(run.summary["steps"], []).append(run)
    most = max(by_steps)
    whole, half = by_steps[most], by_steps.get(most // 2, [])
    if len(whole) < 12:
        raise ValueError(
            f"{folders[0]}: {len(whole)} finished runs with {most} steps; 12 are needed"
        )
    checks = {
        "equal": (equal(whole, splits), LIMIT),
        "planted": (planted(whole, half, splits), 1.0),
        "faint": (faint(whole, splits), LEAST),
    }
    failed = False
    for name, (share, bound) in checks.items():
        well = share <= bound if name == "equal" else share >= bound
        failed |= not well
        sign = "at most" if name == "equal" else "at least"
        print(
            f"{name:<8} significant in {share:6.1%} of {splits} splits ({sign} {bound:.0%}){'' if well else '  FAILED'}"
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
