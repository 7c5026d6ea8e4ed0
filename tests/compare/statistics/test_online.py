"""Sessions of candidates: few false ones are kept, losers cost little, winners are not given up."""

import functools
from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from compare.check.calibration import FALSELY_KEPT, TINY, kept, session
from compare.report.runs import Run
from compare.statistics.online import (
    FALSE,
    LONG,
    LOOKS,
    Noise,
    Word,
    judge,
    level_of,
    pooled,
    shares,
)

TELLING = Noise(1.0, 50)


@functools.cache
def sessions(*effects: float) -> list[list[Word]]:
    """The words on candidates that are so much worse, in deviations, and share the base's runs."""
    draw = np.random.default_rng(0)

    def differences() -> list[list[float]]:
        base = draw.normal(0, 2**-0.5, LOOKS[-1])
        return [(draw.normal(effect, 2**-0.5, LOOKS[-1]) - base).tolist() for effect in effects]

    return [session(differences()) for _ in range(40)]


def share(words: Sequence[Word], verdict: str) -> float:
    return float(np.mean([word.verdict == verdict for word in words]))


def test_of_changes_that_do_nothing_one_in_a_hundred_is_kept_at_most() -> None:
    found = sessions(*[0.0] * 30)
    assert np.mean([share(words, "keep") for words in found]) <= 0.01
    assert (
        np.mean([share(words, "keep") > 0 for words in found])
        <= FALSE + 3 * (0.05 * 0.95 / 40) ** 0.5
    )


def test_of_equal_runs_a_judge_keeps_next_to_none() -> None:
    """As `cli.calibrate` counts them."""
    draw = np.random.default_rng(0)
    runs = [SimpleNamespace(summary={"val_loss": x}) for x in draw.normal(3.0, 0.01, 24)]
    assert kept(cast(list[Run], runs), 20) <= FALSELY_KEPT


def test_losers_end_within_half_of_the_first_round() -> None:
    """Once there is some noise to tell by: after two candidates."""
    words = [word for found in sessions(*[0.0] * 6, *[1.0] * 6) for word in found[6:]]
    assert np.mean([word.difference.n == 1 for word in words]) >= 0.6
    assert share(words, "discard") == 1.0


def test_winners_are_seldom_given_up() -> None:
    """Of 40 sessions with 6 winners each, whose fates share a base: 2 % and three standard errors."""
    words = [word for found in sessions(*[0.0] * 6, *[-2.0] * 6) for word in found[6:]]
    given_up = [word.reason in ("hopeless", "worse", "equal") for word in words]
    assert np.mean(given_up) <= 0.02 + 3 * (0.02 * 0.98 / 40) ** 0.5
    assert share(words, "keep") >= 0.8


def test_levels_add_up_to_what_may_be_spent() -> None:
    assert sum(shares()) == pytest.approx(1.0)
    assert sum(level_of(n, []) for n in range(1, LONG + 1)) == pytest.approx(FALSE / 2)
    assert sum(level_of(n, [5]) for n in range(6, LONG + 1)) < FALSE
    assert level_of(7, [5]) == pytest.approx(FALSE / 2 * (shares()[6] + shares()[1]))
    assert level_of(8, [5, 6]) == pytest.approx(
        FALSE / 2 * (shares()[7] + shares()[2]) + FALSE * shares()[1]
    )
    assert level_of(LONG + 1, []) == 0.0


def test_what_is_kept_holds_at_its_own_level() -> None:
    """The same differences are kept by the first candidate, and not by the hundredth."""
    differences = [-1.0, -1.06, -0.94]
    words = [judge(differences, TINY, level_of(number, []), None) for number in (1, 100)]
    assert [word and word.verdict for word in words] == ["keep", "open"]
    worse = judge([-d for d in differences], TINY, level_of(100, []), None)
    assert worse is not None
    assert (worse.verdict, worse.reason) == ("discard", "worse")  # what is worse has no level


def test_before_the_noise_is_known_nothing_is_given_up() -> None:
    assert pooled([[0.1, 0.2, 0.3]]) is None
    assert pooled([[0.0, 2.0], [5.0, 7.0], [1.0, 3.0], [2.0, 4.0], [9.0]]) == Noise(2**0.5, 4)
    for noise, verdict in ((None, "open"), (TELLING, "discard")):
        word = judge([3.0], TINY, 0.01, noise)
        assert word is not None
        assert (word.verdict, word.difference.n) == (verdict, 1)
    assert judge([], TINY, 0.01, None) is None


def test_a_look_that_was_passed_is_not_repeated() -> None:
    """What was not given up after one seed, and has two by now, is looked at with two."""
    for passed, verdict in ((0, "discard"), (2, "open")):
        word = judge([3.0, -5.0], TINY, 0.01, TELLING, passed)
        assert word is not None
        assert word.verdict == verdict


def test_a_wide_margin_asks_for_more() -> None:
    """Level with the base: a winner by two deviations may look so once, one by five deviations may not."""
    for margin, verdict in ((TINY, "open"), (5.0, "discard")):
        word = judge([0.0], margin, 0.01, TELLING)
        assert word is not None
        assert word.verdict == verdict


def test_the_last_look_ends_it() -> None:
    word = judge([1.0, -1.0] * 6, TINY, 0.01, None)
    assert word is not None
    assert (word.verdict, word.reason, word.difference.n) == ("discard", "not settled", 12)
