"""Statistics over few seeds: paired tests, confidence intervals, Holm's correction, seeds needed."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
from scipy import stats

from train.sweep.expand import ROUNDS

Numbers = np.ndarray[Any, np.dtype[Any]]
LEVEL = 0.95  # of every interval
POWER = 0.8  # chance to find a difference with the seeds that are said to be needed
FEW = 3  # seeds below which a spread is no guide
MANY = 100  # seeds; larger numbers are given as "more than"
#: The limit of p at each look, where seeds come in rounds: equal variants are called different in at most
#: 5 % over all looks, by simulation of normal differences; see `cli.calibrate`.
LIMITS = dict(zip(ROUNDS, (0.0124, 0.0100, 0.0154, 0.0230), strict=True))
RESAMPLES = 2000  # of a bootstrap
LARGEST = 700.0  # nats: e to this is near the largest float


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences, one per seed, with its interval and test."""

    n: int
    mean: float
    sd: float | None  # None for one seed
    low: float | None
    high: float | None
    p: float | None  # of a two-sided paired t-test
    adjusted: float | None = None  # p after Holm's correction for its family
    seeds_needed: int | None = None  # for significance; None: significant already, or unknown

    @property
    def significant(self) -> bool:
        """True if the test holds after Holm's correction."""
        return self.adjusted is not None and self.adjusted < 1 - LEVEL

    @property
    def significance(self) -> str:
        """yes; no, if the interval contains zero; inconclusive, if only the correction disagrees."""
        if self.low is None or self.high is None:
            return "-"  # one seed
        return "yes" if self.significant else "no" if self.low <= 0 <= self.high else "inconclusive"


def mean_interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Mean and Student's t interval; no interval for fewer than two values."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, None, None
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def wilson(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson 1927): for one model, over questions."""
    found = stats.binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return float(found.low), float(found.high)


def with_interval(
    mean: float, low: float | None, high: float | None, show: Callable[[float], str]
) -> str:
    """A mean and its interval as text, each through a function: '35.43 (34.92 to 35.95)'."""
    return (
        show(mean) if low is None or high is None else f"{show(mean)} ({show(low)} to {show(high)})"
    )


MILLION = math.log(1e6)


def ratio(difference: float) -> float:
    """e to a difference of logarithms, as far as a float can hold it: intervals may end far out."""
    return math.exp(min(difference, LARGEST))


def percents(differences: Any) -> Numbers:
    """Differences of logarithms as relative changes in percent, as far as a figure can hold them."""
    found: Numbers = 100 * np.expm1(np.minimum(np.array(differences, float), MILLION))
    return found


def percent(difference: float) -> str:
    """A difference of logarithms as a relative change: '-4.1%'; beyond a factor of a million no more."""
    return "over +1e+08%" if difference > MILLION else f"{math.expm1(difference):+.1%}"


def paired(differences: Sequence[float]) -> Difference:
    """A paired t-test of differences, one per seed, without the correction of `correct`."""
    mean, low, high = mean_interval(differences)
    n = len(differences)
    if n < 2:
        return Difference(n, mean, None, None, None, None)
    sd = statistics.stdev(differences)
    if sd == 0:  # runs that repeat exactly
        return Difference(n, mean, 0.0, low, high, 0.0 if mean else 1.0)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return Difference(n, mean, sd, low, high, p)


def correct(family: Sequence[Difference], *, looks: bool = False) -> list[Difference]:
    """Holm's correction of a family of tests (Holm 1979), and the seeds needed for significance.

    With it, the chance that any is called significant although none differs stays at 5 %; with `looks`,
    where seeds were added in rounds, over all of them.
    """
    many = len([d for d in family if d.p is not None]) > 1
    spent = {i: (1 - LEVEL) / limit_at(d.n, many) if looks else 1.0 for i, d in enumerate(family)}
    tested = sorted((d.p * spent[i], i) for i, d in enumerate(family) if d.p is not None)
    scaled = [min(1.0, p * (len(tested) - rank)) for rank, (p, _) in enumerate(tested)]
    adjusted = dict(zip([i for _, i in tested], accumulate(scaled, max), strict=True))
    corrected = [replace(d, adjusted=adjusted.get(i)) for i, d in enumerate(family)]
    alpha = (1 - LEVEL) / max(1, len(tested))
    return [
        d
        if d.significant or not d.sd or d.n < FEW or looks  # rounds add them as long as it helps
        else replace(d, seeds_needed=seeds_needed(d.mean / d.sd, alpha))
        for d in corrected
    ]


def limit_at(seeds: int, many: bool) -> float:
    """The p below which a test ends at a look at so many seeds; between two looks, the strictest.

    Still to be shared where there are `many` questions. The looks of one are alike, so that their limits
    may add up to 6 %; divided, they are less so, and have to add up to 5 %.
    """
    limit = LIMITS.get(seeds, min(LIMITS.values()))
    return limit * (1 - LEVEL) / sum(LIMITS.values()) if many else limit


def seeds_needed(effect: float, alpha: float) -> int:
    """Paired seeds that find an effect, in standard deviations of the differences, 8 times in 10.

    At most MANY + 1, which stands for more than MANY.
    """
    n = np.arange(2, MANY + 1)
    critical = stats.t.ppf(1 - alpha / 2, n - 1)
    enough = stats.nct.sf(critical, n - 1, abs(effect) * np.sqrt(n)) >= POWER
    return int(n[enough.argmax()]) if enough.any() else MANY + 1


def ratio_interval(numerators: Numbers, denominators: Numbers) -> tuple[float, float]:
    """Interval of sum(numerators) / sum(denominators): percentile bootstrap over paired units.

    2000 resamples of the units with replacement, from a fixed seed.
    """
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
