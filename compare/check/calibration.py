"""Calibration of the report's statistics: false-positive rate, known effect, power."""

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compare.report.analysis import analyse
from compare.report.runs import Run
from compare.statistics.ladder import trends
from compare.statistics.online import LOOKS, Word, judge, level_of, pooled
from compare.statistics.paired import FEW, mean_interval
from compare.statistics.sequential import decide
from compare.statistics.worth import fit, log_more
from train.sweep.expand import ROUNDS

LIMIT = 0.07  # of false positives: 5 %, and the noise of the draws
LEAST = 0.80  # of power
FOUND = 0.95  # of planted effects, by rounds
SEEDS = 5
SEEDS_TO_FIND = 6.5  # of rounds, on average, for two standard deviations
CURVE = {200: 3.2, 400: 2.9, 800: 2.65}  # losses of a simulated baseline, by steps
TIMES = 1.25  # the steps of a simulated variant, charged as those of the baseline
COMPUTE = np.array([2.0, 3.0, 4.0, 5.0]) ** 6  # of the rungs of experiment=ladder, in some unit
FADING = math.log(1.05)  # of a simulated difference at the smallest rung; none at the largest
PREDICTED = 0.90  # of largest rungs, from the smaller ones
CANDIDATES = 100  # of a judge's session
FALSELY_KEPT = 0.01  # of them, at most
TINY = 1e-9  # a margin, in nats, that nothing is equal within
SD = 0.01  # of a simulated run; half of its variance is shared by the runs of a seed


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


@dataclass(frozen=True)
class Words:
    """What many draws were called."""

    words: Counter[str]

    def share(self, *words: str) -> float:
        return sum(self.words[word] for word in words) / self.words.total()


@dataclass(frozen=True)
class Rounds(Words):
    """How rounds of seeds ended, over many draws, and the mean of their seeds."""

    seeds: float


@dataclass(frozen=True)
class Sizes(Words):
    """How differences changed along ladders, and the share whose largest rung was predicted."""

    predicted: float


def largest_share(draws: int) -> float:
    """The share of false words that 5 % may come to in so many draws: three standard errors more."""
    return 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def rounds(
    runs: Sequence[Run], splits: int, *, shift: float, margin: float, seed: int = 0
) -> Rounds:
    """Rounds of the differences between equal runs, drawn in pairs, the second of each made worse.

    `shift` and `margin` are in standard deviations of a difference. Raises ValueError for fewer runs
    than two for each seed of the last round.
    """
    last = ROUNDS[-1]
    if len(runs) < 2 * last:
        raise ValueError(f"{len(runs)} finished runs; rounds need {2 * last}")
    draw, losses = random.Random(seed), [run.summary["val_loss"] for run in runs]
    sd = statistics.stdev(losses) * 2**0.5
    found = []
    for _ in range(splits):
        drawn = draw.sample(losses, 2 * last)
        pairs = zip(drawn[:last], drawn[last:], strict=True)
        found.append(decide([b - a + shift * sd for a, b in pairs], margin * sd))
    return Rounds(Counter(d.word for d in found), statistics.fmean(d.difference.n for d in found))


def worth(splits: int, seeds: int = SEEDS, seed: int = 0) -> float:
    """Coverage of a worth in compute: share of simulated sweeps whose interval holds TIMES."""
    draw, steps = np.random.default_rng(seed), np.array([*CURVE], float)
    curve = fit(steps, np.array([*CURVE.values()]))
    covered = 0
    for _ in range(splits):
        noise = draw.normal(0, SD / 2**0.5, (2, seeds, len(steps)))
        noise += draw.normal(0, SD / 2**0.5, (seeds, 1))
        base, variant = curve.loss(steps) + noise[0], curve.loss(TIMES * steps) + noise[1]
        _, low, high = mean_interval(log_more(steps, base, variant).mean(axis=1).tolist())
        covered += low is not None and high is not None and low <= math.log(TIMES) <= high
    return covered / splits


def ladder(splits: int, smallest: float, largest: float, seeds: int = FEW, seed: int = 0) -> Sizes:
    """Simulated ladders of a difference at the smallest and the largest rung, in nats.

    It is a line in the logarithm of the compute; a run's noise has SD, as for `worth`, and so has a difference.
    """
    draw, position = np.random.default_rng(seed), np.log(COMPUTE / COMPUTE[0])
    effect = smallest + (largest - smallest) * position / position[-1]
    words: Counter[str] = Counter()
    predicted = 0
    for _ in range(splits):
        noise = draw.normal(0, SD / 2**0.5, (2, seeds, len(COMPUTE)))
        (found,) = trends([(COMPUTE, effect + noise[1] - noise[0])])
        words[found.word] += 1
        last, measured = found.last, found.differences[-1].mean
        predicted += last is not None and last.low <= measured <= last.high
    return Sizes(words, predicted / splits)


def kept(runs: Sequence[Run], sessions: int, seed: int = 0) -> float:
    """The share of changes that do nothing which a judge keeps, with losses drawn from equal runs.

    CANDIDATES of a session share one base, and with it its luck.
    """
    draw, losses = random.Random(seed), [run.summary["val_loss"] for run in runs]
    found = 0
    for _ in range(sessions):
        base, *drawn = (draw.choices(losses, k=LOOKS[-1]) for _ in range(1 + CANDIDATES))
        differences = [[new - old for new, old in zip(d, base, strict=True)] for d in drawn]
        found += sum(word.verdict == "keep" for word in session(differences))
    return found / (sessions * CANDIDATES)


def session(candidates: Sequence[Sequence[float]]) -> list[Word]:
    """The judge's words on candidates, one after another, by their differences from the base."""
    words: list[Word] = []
    seen: list[Sequence[float]] = []
    for number, differences in enumerate(candidates, 1):
        winners = [i for i, word in enumerate(words, 1) if word.verdict == "keep"]
        word = judge(differences, TINY, level_of(number, winners), pooled(seen))
        assert word is not None
        words.append(word)
        seen.append(differences[: word.difference.n])
    return words


def differ(one: Sequence[Run], two: Sequence[Run]) -> bool:
    """True if a report calls their quality different, as variants A and B with seeds 0, 1, ..."""
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
