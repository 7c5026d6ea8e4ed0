"""`python -m cli.lookup`: the exercises on attention as a lookup."""

import sys
from pathlib import Path

from cli.entry import helped, run_command
from compare.lab.lookup import INNER, draw_noise, exercises, inner, noise
from train.record.terminal import columns

USAGE = """\
Attention as a lookup, in a few seconds and without a model: what it takes to copy a value, to average
two, to undo a sum; and what keys of varying length do to an average that one head reads, or two.
Prints each number by its formula and by the attention kernel, and draws outputs/lookup.svg.

  python -m cli.lookup
"""
DRAWS = 10_000
OUTPUT = Path("outputs/lookup.svg")


def main(arguments: list[str]) -> int:
    """`python -m cli.lookup`."""
    if helped(arguments, USAGE):
        return 0
    rows = [["exercise", "setting", "formula", "attention"]]
    rows += [[e.name, e.setting, f"{e.formula:.6f}", f"{e.attention:.6f}"] for e in exercises()]
    print(columns(rows))
    found = noise(DRAWS)
    low, high = INNER
    print(f"\naverage of two values, the length of one key drawn from N(1, 1/2) {DRAWS:,} times")
    rows = [["beta", "read by", "mean weight", "deviation", f"between {low:g} and {high:g}"]]
    for (beta, heads), share in found.items():
        mean, deviation = share.mean().item(), share.std().item()
        rows.append([f"{beta:g}", heads, f"{mean:.3f}", f"{deviation:.3f}", f"{inner(share):.0%}"])
    print(columns(rows))
    draw_noise(found).write(OUTPUT)
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
