"""One candidate after another against a base: what to keep, and when to give up.

The level of each candidate follows from those before it, so that of all that is kept in a session few
are false. A candidate is given up as soon as a winner would hardly look like it.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from compare.statistics.paired import LEVEL, LIMITS, Difference, limit_at, paired
from compare.statistics.sequential import answered
from train.sweep.expand import ROUNDS

LOOKS = (1, 2, *ROUNDS)  # seeds after which a candidate is looked at
WINNER = (
    2.0  # deviations of a paired difference by which a candidate has to be better, to be looked for
)
#: The chance that such a winner is given up at each look but the last, were the noise known.
GIVEN_UP = dict(zip(LOOKS, (0.011, 0.008, 0.004, 0.002, 0.001), strict=False))
KNOWN_FROM = 4  # degrees of freedom; fewer tell too little of the noise to give up by
MANY = 100  # of them, above which a t distribution is a normal one
FALSE = 1 - LEVEL  # of what is kept, at most, on average over sessions
LONG = 2000  # candidates of a session that share what may be spent


@dataclass(frozen=True)
class Noise:
    """The standard deviation of a paired difference, with the degrees of freedom it was found with."""

    sd: float
    df: int


@dataclass(frozen=True)
class Word:
    """What the seeds so far say of a candidate: keep, discard or open, and why."""

    verdict: str
    reason: str
    difference: Difference  # of the seeds looked at


@functools.cache
def shares() -> tuple[float, ...]:
    """The part of the level that each candidate gets, in order: log(max(j, 2)) / (j exp(sqrt(log j))).

    In proportion, and 1 together (Javanmard and Montanari 2018).
    """
    j = np.arange(1, LONG + 1)
    share = np.log(np.maximum(j, 2)) / (j * np.exp(np.sqrt(np.log(j))))
    return tuple(map(float, share / share.sum()))


def level_of(number: int, kept: Sequence[int]) -> float:
    """The chance at which candidate `number`, from 1, may be kept though it is no better: LORD++.

    `kept` are the numbers of those kept before. Half of FALSE is there to begin with, the first one kept
    adds the other half, and each later one all of it (Ramdas et al. 2017). Zero after 2000 candidates.
    """

    def share(after: int) -> float:
        return shares()[number - after - 1] if number - after <= LONG else 0.0

    return sum(FALSE / (1 + (i < 2)) * share(k) for i, k in enumerate([0, *sorted(kept)]))


def pooled(candidates: Sequence[Sequence[float]]) -> Noise | None:
    """The noise within the paired differences of several candidates; None if they tell too little."""
    df = sum(len(differences) - 1 for differences in candidates if differences)
    if df < KNOWN_FROM:
        return None
    squares = sum(float(np.var(d)) * len(d) for d in candidates if d)
    return Noise(math.sqrt(squares / df), df)


def judge(
    differences: Sequence[float],
    margin: float,
    level: float,
    noise: Noise | None,
    passed: int = 0,
) -> Word | None:
    """Look at paired differences in scores, in the order of their seeds, as often as their number allows.

    `margin` is the difference that does not matter, in the same scores; `level` bounds the chance that a
    candidate that is no better is kept, over all looks (Bonferroni), whatever it shares with others;
    `noise` is that of other candidates; looks at fewer seeds than have `passed` do not give up again.
    None without a seed.
    """
    found = None
    for n in LOOKS:
        if len(differences) < n:
            break
        d = paired(differences[:n])
        found = ended(d, margin, level) or Word("open", "not settled", d)
        if found.verdict == "open" and n >= passed and unlikely(d, margin, noise):
            found = Word("discard", "hopeless", d)
        if found.verdict != "open":
            return found
    if found and found.difference.n == LOOKS[-1]:
        return Word("discard", "not settled", found.difference)
    return found


def ended(d: Difference, margin: float, level: float) -> Word | None:
    """The word of the tests: better at this level, or worse or equal at that of a single question."""
    if d.n not in LIMITS:
        return None
    spent = 2 * level * limit_at(d.n, many=True) / (1 - LEVEL)  # the other side has as much
    if d.p is not None and d.p < spent and d.mean < 0:
        return Word("keep", "better", d)
    answer = answered(d, margin, limit_at(d.n, many=False))
    return Word("discard", answer, d) if answer in ("worse", "equal") else None


def unlikely(d: Difference, margin: float, noise: Noise | None) -> bool:
    """True if a candidate better by two deviations, or by a larger margin, would seldom look as bad."""
    if noise is None or not noise.sd or d.n not in GIVEN_UP:
        return False
    effect = max(WINNER, margin / noise.sd)
    return d.mean / noise.sd * math.sqrt(d.n) > bound(d.n, effect, min(noise.df, MANY))


@functools.cache
def bound(n: int, effect: float, df: int) -> float:
    """The t of n seeds that a candidate better by an effect, in deviations, exceeds seldom enough."""
    return float(stats.nct.ppf(1 - GIVEN_UP[n], df, -effect * math.sqrt(n)))
