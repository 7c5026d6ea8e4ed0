"""Calibration of the report's statistics: false-positive rate, known effect, power."""

import random
import statistics
from collections.abc import Sequence
from dataclasses import replace

from compare.report.analysis import analyse
from compare.report.runs import Run

LIMIT = 0.07  # of false positives
LEAST = 0.80  # of power
SEEDS = 5


def equal(runs: Sequence[Run], splits: int, seed: int = 0) -> float:
    """False-positive rate: share of splits of equal runs in two that differ significantly."""
    draw = random.Random(seed)
    half = len(runs) // 2
    return statistics.fmean(
        differ(mixed[:half], mixed[half : 2 * half])
        for mixed in (draw.sample(list(runs), len(runs)) for _ in range(splits))
    )


def planted(whole: Sequence[Run], half: Sequence[Run], splits: int, seed: int = 0) -> float:
    """Known effect: share of draws of SEEDS seeds where half the steps differ significantly."""
    draw = random.Random(seed)
    one, two = ({run.seed: run for run in runs} for runs in (whole, half))
    shared = sorted(one.keys() & two.keys())
    if len(shared) < SEEDS:
        raise ValueError(f"{len(shared)} seeds have runs with half the steps; {SEEDS} are needed")
    chosen = (draw.sample(shared, SEEDS) for _ in range(splits))
    return statistics.fmean(differ([one[s] for s in c], [two[s] for s in c]) for c in chosen)


def faint(runs: Sequence[Run], splits: int, seed: int = 0) -> float:
    """Power: share of draws of SEEDS seeds where a shift of two standard deviations is significant.

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
    """True if a report calls their quality different, as variants A and B with seeds 0, 1, ..."""
    labelled = [
        replace(run, summary=run.summary | {"attn": name, "seed": seed}, config=whole_config)
        for name, runs in (("A", one), ("B", two))
        for seed, run in enumerate(runs)
        for whole_config in [one[0].config]
    ]
    study = analyse(labelled)
    quality = [c.quality for c in study.comparisons if c.quality]
    return any(d.significant for d in [*study.differences.values(), *quality])
