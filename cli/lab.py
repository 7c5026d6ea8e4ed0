"""`python -m cli.lab`: exercises on attention that need no model."""

import sys
from pathlib import Path

from cli.entry import run_command
from compare.lab.lookup import INNER, draw_noise, exercises, inner, noise
from compare.lab.scores import cases, draw, fit, table
from train.record.terminal import columns, tracked

USAGE = """\
Exercises on attention, in less than a minute and without a model.

  python -m cli.lab lookup   attention as a lookup: what it takes to copy a value, to average two, to
                             undo a sum; and what keys of varying length do to an average that one
                             head reads, or two. Each number by its formula and by the attention
                             kernel; draws outputs/lookup.svg
  python -m cli.lab scores   which attention scores can be the cosine of the angle between key and
                             query? Fits the scaled dot product, multiplicative, concatenated and
                             additive scores to random pairs; prints R^2 on held-out pairs and draws
                             outputs/scores.svg
"""
DRAWS = 10_000


def main(arguments: list[str]) -> int:
    """`python -m cli.lab`. Raises ValueError for anything but one exercise."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    if len(arguments) != 1 or arguments[0] not in EXERCISES:
        raise ValueError(
            f"{' '.join(arguments) or 'no exercise'}: give one of {', '.join(EXERCISES)}"
        )
    EXERCISES[arguments[0]](Path("outputs") / f"{arguments[0]}.svg")
    return 0


def lookup(picture: Path) -> None:
    """Print each number by its formula and by the attention kernel; draw the noise of averages."""
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
    draw_noise(found).write(picture)


def scores(picture: Path) -> None:
    """Fit each score to the cosine of random pairs; print R^2 and draw the fits."""
    fits = [fit(case) for case in tracked([*cases()], "fitting")]
    print(columns(table(fits)))
    draw(fits).write(picture)


EXERCISES = {"lookup": lookup, "scores": scores}

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
