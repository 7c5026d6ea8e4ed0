"""How a difference changes along a ladder, the same comparison at several sizes of the model.

Differences are in logarithms of losses, a row per seed and a column per rung. Each seed has a line of its
own by the logarithm of the rungs' training compute, by least squares with equal weights. Any result is
then a sum over rungs with fixed weights, so that Student's t over seeds is exact for normal noise, also
where the noise differs between rungs or the rungs of a seed have some of it in common.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compare.statistics.paired import Difference, Numbers, correct, paired

RUNGS = 3  # the fewest that make a ladder: two always lie on a line
DECADE = 10.0  # times the compute of the largest rung: the end of what is predicted


@dataclass(frozen=True)
class Prediction:
    """The mean difference that as many seeds would have at some compute, with its interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Trend:
    """What the rungs say of a variant: differences from the baseline, and how they change.

    `word` is persists, grows, fades or not settled.
    """

    differences: list[Difference]  # at each rung
    slope: Difference  # a doubling of compute; corrected for the number of variants
    beyond: Prediction  # at ten times the compute of the largest rung
    last: (
        Prediction | None
    )  # at the largest rung, from the others; None if they are fewer than three
    word: str


def too_little(compute: Sequence[float], seeds: int) -> str | None:
    """The reason why rungs of this compute, with so many seeds that have them all, are no ladder."""
    if len(compute) < RUNGS:
        return f"{len(compute)} sizes that both have, and a slope needs {RUNGS}: add sizes"
    if seeds < 2:
        return f"seeds that both have at every size: {seeds}, and an interval needs 2: add seeds"
    if compute[-1] < 2 * compute[0]:
        return (
            f"the largest size took {compute[-1] / compute[0]:.2g} times the compute of the smallest, "
            "and a slope per doubling needs 2: add steps with size"
        )
    return None


def slope_weights(compute: Numbers) -> Numbers:
    """The weights (rungs,) whose sum over differences is the slope of their line, a doubling."""
    centred = np.log2(compute) - np.log2(compute).mean()
    return np.asarray(centred / (centred**2).sum())


def line_weights(compute: Numbers, at: float) -> Numbers:
    """The weights (rungs,) whose sum over differences is the value of their line at some compute.

    Raises ValueError for more than ten times the largest compute.
    """
    if at > DECADE * max(compute):
        raise ValueError(
            f"a difference at {at:.2g} FLOPs is not predicted from rungs of up to {max(compute):.2g}: "
            f"at most {DECADE:g} times as much"
        )
    ahead = math.log2(at) - np.log2(compute).mean()
    return np.asarray(1 / len(compute) + ahead * slope_weights(compute))


def on_line(compute: Numbers, differences: Numbers, at: float) -> Difference:
    """The value of the lines at some compute."""
    return paired((differences @ line_weights(compute, at)).tolist())


def predict(compute: Numbers, differences: Numbers, at: float) -> Prediction:
    """What as many new seeds would measure at some compute, from two or more seeds.

    The interval adds to that of the lines the noise of the new runs, taken to be that of a rung here,
    independent of the others: a value with weights w has w.w times the variance of a rung.
    """
    weights = line_weights(compute, at)
    d = paired((differences @ weights).tolist())
    assert d.low is not None
    half = (d.mean - d.low) * math.sqrt(1 + 1 / float(weights @ weights))
    return Prediction(d.mean, d.mean - half, d.mean + half)


def trends(ladders: Sequence[tuple[Numbers, Numbers]], *, looks: bool = False) -> list[Trend]:
    """The trend of each variant, from its rungs' compute (rungs,) and its differences (seeds, rungs).

    From the smallest rung to the largest, with three rungs and two seeds or more. Holm's correction holds
    the chance of any wrong slope among variants whose difference is constant at 5 %; with `looks`, where
    seeds came in rounds, over all of them.
    """
    found = [paired((d @ slope_weights(compute)).tolist()) for compute, d in ladders]
    slopes = correct(found, looks=looks)
    return [trend(compute, d, slope) for (compute, d), slope in zip(ladders, slopes, strict=True)]


def trend(compute: Numbers, differences: Numbers, slope: Difference) -> Trend:
    """The trend of a variant whose slope is known."""
    beyond = predict(compute, differences, DECADE * compute[-1])
    ends = [sign(on_line(compute, differences, at)) for at in (compute[0], compute[-1])]
    return Trend(
        differences=[paired(column.tolist()) for column in differences.T],
        slope=slope,
        beyond=beyond,
        last=left_out(compute, differences),
        word=word(slope, ends[0], ends[1], sign(beyond)),
    )


def left_out(compute: Numbers, differences: Numbers) -> Prediction | None:
    """The prediction for the largest rung from the others, were it within a decade of them."""
    few = len(compute) - 1 < RUNGS or compute[-1] > DECADE * compute[-2]
    return None if few else predict(compute[:-1], differences[:, :-1], compute[-1])


def sign(d: Difference | Prediction) -> int:
    """-1 or 1 for an interval below or above zero; 0 for one that holds it."""
    assert d.low is not None
    assert d.high is not None
    return (d.low > 0) - (d.high < 0)


def word(slope: Difference, first: int, last: int, beyond: int) -> str:
    """The word for a slope and the signs of the line at both ends and one decade further.

    With a slope, a difference fades if the line begins on the other side of zero, and grows if it only
    ends on the slope's side. Without one, it persists if it still has its sign a decade further.
    """
    if slope.significant:
        away = 1 if slope.mean > 0 else -1
        return "fades" if first == -away else "grows" if last == away else "not settled"
    steady = slope.significance == "no" and last == beyond != 0
    return "persists" if steady else "not settled"
