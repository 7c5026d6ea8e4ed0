"""Is the verdict honest? Equal runs must not differ, unequal ones must: python -m compare.honesty."""

import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from compare.results import Run, read
from compare.study import examine
from train.cli import door

USAGE = """\
Three checks of the report's statistics on the runs of experiment=honesty (12 seeds, and 12 with half
the steps):
  equal    seeds of one variant, split at random into two that claim to differ: called real in 5 % or so
  planted  a variant with half the steps, at 5 random seeds: found every time
  faint    equal runs, one side shifted by two standard deviations of their differences, at 5 seeds

  python train.py experiment=honesty
  python -m compare.honesty [DIR] [splits=1000]
"""
LIMIT = 0.07  # of equal runs called different
LEAST = 0.80  # of faint differences found
SEEDS = 5


def main(arguments: list[str]) -> int:
    """`python -m compare.honesty`: exit code 1 if a check fails."""
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
            f"{name:<8} called real in {share:6.1%} of {splits} splits ({sign} {bound:.0%}){'' if well else '  FAILED'}"
        )
    return 1 if failed else 0


def equal(runs: Sequence[Run], splits: int, seed: int = 0) -> float:
    """How often two random halves of equal runs are called different."""
    draw = random.Random(seed)
    half = len(runs) // 2
    return statistics.fmean(
        differ(mixed[:half], mixed[half : 2 * half])
        for mixed in (draw.sample(list(runs), len(runs)) for _ in range(splits))
    )


def planted(whole: Sequence[Run], half: Sequence[Run], splits: int, seed: int = 0) -> float:
    """How often runs with half the steps are called different, at SEEDS random seeds."""
    draw = random.Random(seed)
    one, two = ({run.seed: run for run in runs} for runs in (whole, half))
    shared = sorted(one.keys() & two.keys())
    if len(shared) < SEEDS:
        raise ValueError(f"{len(shared)} seeds have runs with half the steps; {SEEDS} are needed")
    chosen = (draw.sample(shared, SEEDS) for _ in range(splits))
    return statistics.fmean(differ([one[s] for s in c], [two[s] for s in c]) for c in chosen)


def faint(runs: Sequence[Run], splits: int, seed: int = 0) -> float:
    """How often a shift of two standard deviations of paired differences is found at SEEDS seeds.

    The deviations are drawn from a normal distribution as wide as that between the runs.
    """
    draw = random.Random(seed)
    spread = statistics.stdev(run.summary["val_loss"] for run in runs)  # of one run
    sd = spread * 2**0.5  # of a difference of two
    found = []
    for _ in range(splits):
        base = draw.sample(list(runs), SEEDS)
        losses = [run.summary["val_loss"] + draw.gauss(2 * sd, sd) for run in base]
        pairs = zip(base, losses, strict=True)
        shifted = [replace(run, summary=run.summary | {"val_loss": loss}) for run, loss in pairs]
        found.append(differ(base, shifted))
    return statistics.fmean(found)


def differ(one: Sequence[Run], two: Sequence[Run]) -> bool:
    """Whether a report calls the quality of these different, as variants A and B with seeds 0, 1, ..."""
    labelled = [
        replace(run, summary=run.summary | {"attn": name, "seed": seed}, config=whole_config)
        for name, runs in (("A", one), ("B", two))
        for seed, run in enumerate(runs)
        for whole_config in [one[0].config]
    ]
    found = examine(labelled)
    judged = [*found.rows.values(), *(c.quality for c in found.comparisons if c.quality)]
    return any(difference.real for difference in judged)


if __name__ == "__main__":
    sys.exit(door(main, sys.argv[1:]))
