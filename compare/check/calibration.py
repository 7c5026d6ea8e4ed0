"""How often the verdict is wrong: equal runs split in two, and planted differences."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

from compare.report.analysis import analyse
from compare.report.runs import Run

LIMIT = 0.07  # of equal runs called different
LEAST = 0.80  # of faint differences found
SEEDS = 5


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
    same = one[0].config
    labelled = [
        replace(
            run,
            summary=run.summary | {"seed": seed},
            config=same | {"choices": same["choices"] | {"attn": name}},
        )
        for name, runs in (("A", one), ("B", two))
        for seed, run in enumerate(runs)
    ]
    study = analyse(labelled)
    quality = [c.quality for c in study.comparisons if c.quality]
    return any(d.significant for d in [*study.differences.values(), *quality])
