"""`python -m cli.scores`: how well each attention score fits an angle."""

import sys
from pathlib import Path

from cli.entry import helped, run_command
from compare.lab.scores import cases, draw, fit, table
from train.record.terminal import columns, tracked

USAGE = """\
Which attention scores can be the cosine of the angle between key and query? Fits the scaled dot product,
multiplicative, concatenated and additive scores to random pairs, in less than a minute and without a
model; prints R^2 on held-out pairs and draws outputs/scores.svg.

  python -m cli.scores
"""
OUTPUT = Path("outputs/scores.svg")


def main(arguments: list[str]) -> int:
    """`python -m cli.scores`."""
    if helped(arguments, USAGE):
        return 0
    fits = [fit(case) for case in tracked([*cases()], "fitting")]
    print(columns(table(fits)))
    draw(fits).write(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
