"""What a handful of seeds can tell: paired differences, intervals, and how many seeds would do."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Numbers = np.ndarray[Any, np.dtype[Any]]
LEVEL = 0.95  # of every interval
POWER = 0.8  # chance to find a difference, where seeds to settle it are counted
FEW = 3  # seeds below which a spread is no guide
MANY = 100  # seeds; beyond so many it says "more than"
RESAMPLES = 2000  # of a bootstrap


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, one a seed, with its interval and what it amounts to."""

    n: int
    mean: float
    sd: float | None  # None for one seed
    low: float | None
    high: float | None
    p: float | None  # of a two-sided paired t-test
    adjusted: float | None = None  # p after Holm's correction for its family
    seeds_needed: int | None = (
        None  # to settle it at this size and spread; None: settled, or unknown
    )

    @property
    def real(self) -> bool:
        """Whether it is called a difference: beyond the noise after the correction."""
        return self.adjusted is not None and self.adjusted < 1 - LEVEL


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and Student's t interval; no interval for fewer than two values."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, None, None
    from scipy import stats

    sd = statistics.stdev(values)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1)) * sd / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired(differences: Sequence[float]) -> Difference:
    """A paired t-test of differences, one a seed. Not yet corrected: see `family`."""
    mean, low, high = mean_interval(differences)
    n = len(differences)
    if n < 2:
        return Difference(n, mean, None, None, None, None)
    from scipy import stats

    sd = statistics.stdev(differences)
    if sd == 0:  # runs that repeat exactly
        return Difference(n, mean, 0.0, low, high, 0.0 if mean else 1.0)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(n, mean, sd, low, high, p)


def family(found: Sequence[Difference]) -> list[Difference]:
    """The same differences judged together: Holm's correction, and the seeds that would settle each.

    With it the chance that any of them is called real though none is stays at 5 %.
    """
    tested = sorted((d.p, i) for i, d in enumerate(found) if d.p is not None)
    adjusted: dict[int, float] = {}
    worst = 0.0
    for rank, (p, i) in enumerate(tested):
        worst = max(worst, min(1.0, p * (len(tested) - rank)))
        adjusted[i] = worst
    judged = [replace(d, adjusted=adjusted.get(i)) for i, d in enumerate(found)]
    alpha = (1 - LEVEL) / max(1, len(tested))
    return [
        d
        if d.real or not d.sd or d.n < FEW
        else replace(d, seeds_needed=seeds_needed(d.mean / d.sd, alpha))
        for d in judged
    ]


def seeds_needed(effect: float, alpha: float) -> int:
    """Paired seeds that find an effect, in standard deviations of the differences, 8 times in 10.

    At most MANY + 1, which stands for more than MANY.
    """
    from scipy import stats

    n = np.arange(2, MANY + 1)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    enough = stats.nct.sf(critical, n - 1, abs(effect) * np.sqrt(n)) >= POWER
    return int(n[enough.argmax()]) if enough.any() else MANY + 1


def ratio_interval(numerators: Numbers, denominators: Numbers) -> tuple[float, float]:
    """An interval of sum / sum over units that were drawn together: percentile bootstrap.

    2000 resamples of the units with replacement, from a fixed seed.
    """
    from scipy import stats

    found = stats.bootstrap(
        (np.asarray(numerators), np.asarray(denominators)),
        lambda a, b, axis: a.sum(axis=axis) / b.sum(axis=axis),
        paired=True,
        vectorized=True,
        batch=max(1, 10**7 // len(numerators)),
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
