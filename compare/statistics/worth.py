"""The worth of a variant in compute: what the baseline would need for its loss, over what it used.

The baseline's loss falls with its training compute C as L(C) = E + A * C ** -b (Henighan et al. 2020).
Each seed has a curve of its own, so that the spread over seeds is that of the runs and of the curve.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compare.statistics.paired import LEVEL, Numbers, mean_interval

BUDGETS = 3  # the fewest that a curve of three parameters can be fitted to
BEYOND = 2.0  # times the compute of the largest budget, or the smallest divided by it: the end of a curve
EXPONENTS = (1e-3, 10.0)  # that are tried


@dataclass(frozen=True)
class Curve:
    """Loss by training compute C: floor + scale * C ** -exponent."""

    floor: float
    scale: float
    exponent: float

    def loss(self, compute: Numbers) -> Numbers:
        """The losses of the curve at some compute, of the same shape."""
        return self.floor + self.scale * np.asarray(compute) ** -self.exponent

    def more(self, losses: Numbers, reached: Numbers) -> Numbers:
        """ln of the factor in compute that takes the baseline from its own `losses` to those `reached`.

        The curve is moved through each loss of the baseline, and so what a pair of runs has in common
        cancels out. NaN for a loss that is not above the floor.
        """
        above = [np.asarray(x) - self.floor for x in (losses, reached)]
        base, variant = (np.log(np.where(x > 0, x, np.nan)) for x in above)
        return np.asarray((base - variant) / self.exponent)


def fit(compute: Numbers, losses: Numbers, floor: float | None = None) -> Curve:
    """The curve with the least squared error in the losses, both (budgets,); its floor is at least 0.

    Variable projection (Golub and Pereyra 1973): given the exponent, floor and scale are a linear least
    squares problem, so that the search is over the exponent alone. A `floor` that is known is kept.
    Raises ValueError for fewer than 3 budgets.
    """
    compute, losses = np.asarray(compute, float), np.asarray(losses, float)
    if len(set(compute)) < BUDGETS:
        raise ValueError(f"{len(set(compute))} budgets; a curve needs {BUDGETS}")
    unit = np.exp(np.log(compute).mean())  # powers of 1e20 would leave no digits

    def linear(exponents: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Floor, scale and squared error at each exponent."""
        powers = (compute / unit) ** -exponents[:, None]  # (exponents, budgets)
        centred = powers - powers.mean(1, keepdims=True)
        free = losses.mean() - powers.mean(1) * (centred @ losses) / (centred**2).sum(1)
        bottom = np.maximum(free, 0.0) if floor is None else np.full(len(exponents), floor)
        scale = (powers * (losses - bottom[:, None])).sum(1) / (powers**2).sum(1)
        errors = bottom[:, None] + scale[:, None] * powers - losses
        return bottom, scale, (errors**2).sum(1)

    low, high = EXPONENTS
    while high / low > 1 + 1e-9:
        exponents = np.geomspace(low, high, 60)
        best = int(linear(exponents)[-1].argmin())
        low, high = exponents[max(best - 1, 0)], exponents[min(best + 1, 59)]
    (bottom,), (scale,), _ = linear(np.array([low]))
    return Curve(float(bottom), float(scale * unit**low), float(low))


def log_more(compute: Numbers, losses: Numbers, reached: Numbers) -> Numbers:
    """`Curve.more` of each seed, by the curve of its own baseline runs.

    The compute of the budgets is (budgets,), the losses of the baseline and those reached by a variant
    are (seeds, budgets), as is the result. A NaN stays one.
    """
    pairs = zip(losses, reached, strict=True)
    return np.array([fit(compute, base).more(base, variant) for base, variant in pairs])


def no_curve(compute: Numbers, losses: Numbers) -> str | None:
    """The reason why the losses (seeds, budgets) at some compute (budgets,) are no curve to judge by.

    None if there are three budgets, and the slope of the loss by the logarithm of the compute is below
    zero in every seed and in its interval over the seeds.
    """
    if len(compute) < BUDGETS:
        return f"the baseline has {len(compute)} budgets, and a curve needs {BUDGETS}: add steps"
    if len(losses) < 2:
        return "the baseline has one seed with all budgets, and an interval needs 2: add seeds"
    slopes = np.polyfit(np.log2(compute), np.transpose(losses), 1)[0]
    mean, low, high = mean_interval([float(slope) for slope in slopes])
    assert low is not None
    assert high is not None
    if high < 0 and max(slopes) < 0:
        return None
    return (
        f"the baseline's loss does not clearly fall with compute: {mean:+.4f} a doubling "
        f"({LEVEL:.0%} interval {low:+.4f} to {high:+.4f}): add seeds, or steps further apart"
    )


def not_covered(compute: Numbers, at: float, more: Sequence[float]) -> str | None:
    """The reason why a loss lies outside of what a curve over some compute (budgets,) covers.

    `more` is that of each seed, see `log_more`, for a budget whose compute is `at`. None if the curve
    is asked for no more than twice the compute of its largest budget, and no less than half that of its
    smallest.
    """
    needed = math.log(at) + float(np.mean(more))
    if math.isnan(needed):
        return "the baseline's curve does not come down to its loss"
    above, below = needed - math.log(max(compute)), needed - math.log(min(compute))
    if above > math.log(BEYOND):
        return f"its loss would take the baseline {times(above)} times its largest budget"
    if below < -math.log(BEYOND):
        return f"its loss would take the baseline {times(below)} of its smallest budget"
    return None


def times(log: float) -> str:
    """A ratio, from its logarithm, as far as it says anything."""
    if abs(log) > math.log(1000):
        return "over 1,000" if log > 0 else "less than 0.001"
    return f"{math.exp(log):.2g}"
