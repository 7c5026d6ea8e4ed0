"""Runs compared: which variant differs from which in what, by how much, and how surely."""

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.report.caveats import doubts, one_of, side_by_side
from compare.report.runs import Run, read
from compare.report.statistics import Difference, family, paired
from compare.report.variants import Variant, is_baseline, pairs, plain, variants_of
from data.atomic import read_json
from train.config.compose import parse
from train.config.old_spellings import current_overrides


@dataclass(frozen=True)
class Ruler:
    """What quality is measured in: a run's score, lower is better, on a scale of logarithms."""

    key: str  # of the summary
    name: str
    of: Callable[[Run], float | None]


def score(key: str, *, log: bool = False) -> Callable[[Run], float | None]:
    """A number of a run's summary, or its logarithm; None unless it is finite, and exp of it too."""

    def of(run: Run) -> float | None:
        value = run.get(key)
        if value is None or not math.isfinite(value) or (log and value <= 0):
            return None
        found = math.log(value) if log else float(value)
        return found if abs(found) < HUGE else None

    return of


HUGE = 700.0  # nats: e to this is near the largest number there is
PERPLEXITY = Ruler("val_perplexity", "perplexity", score("val_loss"))
BITS = Ruler("val_bits_per_byte", "bits per byte", score("val_bits_per_byte", log=True))
TRAINING = Ruler("train_loss", "training perplexity", score("train_loss"))
STEP_TIME = score("step_ms", log=True)


@dataclass(frozen=True)
class Comparison:
    """One level of a factor against another, all else equal."""

    factor: str
    level: str
    base: str
    partners: list[str]  # what it was compared over: the labels of the other factors
    quality: Difference | None  # of the ruler's scale, level minus base
    time: Difference | None  # of the log of a step's time
    ratios: dict[str, float | None]  # level / base of what is counted, not measured with noise


@dataclass(frozen=True)
class Study:
    """All that a report shows, before it is laid out."""

    variants: list[Variant]
    baseline: Variant
    ruler: Ruler | None  # None: no quality can be compared
    rate: float | None  # the learning rate that all are compared at, where several were tried
    rows: dict[int, Difference]  # of each variant to the baseline, by its place among variants
    times: dict[int, Difference]
    comparisons: list[Comparison]
    times_compare: bool
    warnings: list[str]

    @property
    def compared(self) -> list[Variant]:
        """The variants at the shared learning rate: all, if only one was tried."""
        return at_rate(self.variants, self.rate)


COUNTED = ("kv_cache_bytes_per_token", "peak_train_bytes", "params", "flops_per_token")


def study(folders: Sequence[Path], baseline: str | None = None) -> Study:
    """Read runs and compare them. `baseline` names a variant, as "attn=mha pos=rope".

    Raises ValueError if there are no runs, or no such baseline among them.
    """
    path = folders[0] / "sweep.json"
    sweep = read_json(path) if path.exists() else {}
    return examine(read(folders), baseline or sweep.get("baseline"), named=baseline is not None)


def examine(runs: Sequence[Run], baseline: str | None = None, *, named: bool = False) -> Study:
    """Compare runs. A baseline that was `named` must be among them; another gives way to the first."""
    variants, confounded = variants_of(runs)
    base = choose_baseline(variants, baseline, must=named)
    done = [run for run in runs if run.done]
    ruler = ruler_of(done)
    rate = shared_rate(variants, ruler)
    compared = at_rate(variants, rate)
    if base not in compared:
        at_shared = pairs(variants, "optim.lr", plain(base.factors["optim.lr"]), plain(rate))
        base = next((two for one, two in at_shared if one is base), compared[0])
    others = [(variants.index(v), v) for v in compared if v is not base]
    clock = STEP_TIME if comparable_times(done) else None
    asked = {i: [(v, base)] for i, v in others}
    rows, times = judged(asked, ruler.of if ruler else None), judged(asked, clock)
    return Study(
        variants=variants,
        baseline=base,
        ruler=ruler,
        rate=rate,
        rows=rows,
        times=times,
        comparisons=comparisons_of(compared, base, ruler, clock, memory=comparable_memory(done)),
        times_compare=clock is not None,
        warnings=list(doubts(runs, variants, confounded)),
    )


def choose_baseline(variants: list[Variant], text: str | None, *, must: bool) -> Variant:
    """The variant that a text names; without one, or if it is not there and need not be, the first."""
    asked = current_overrides("train", shlex.split(text or ""))
    wanted = {o.key_or_group: o.value() for o in parse(asked)}
    found = [v for v in variants if is_baseline(v, wanted)] if wanted else []
    found = [v for v in found if v.done] or found if must else [v for v in found if v.done]
    if must and not found:
        raise ValueError(
            f"baseline={text}: no such variant here; there are {', '.join(v.label for v in variants)}"
        )
    return (found or [v for v in variants if v.done] or variants)[0]


def ruler_of(done: Sequence[Run]) -> Ruler | None:
    """Perplexity; bits per byte across tokenizers; nothing across corpora."""
    texts = {run.get("data_fingerprint") for run in done}
    if len(texts) != 1:
        return None
    if all(run.get("val_loss") is None for run in done):
        return TRAINING if any(run.get("train_loss") is not None for run in done) else None
    return PERPLEXITY if len({run.get("tokenizer_sha256") for run in done}) == 1 else BITS


def at_rate(variants: Sequence[Variant], rate: float | None) -> list[Variant]:
    return [v for v in variants if rate is None or v.factors.get("optim.lr") == rate]


def shared_rate(variants: Sequence[Variant], ruler: Ruler | None) -> float | None:
    """Of the learning rates tried with most variants, the one that is best on average over them.

    None if one was tried, or if nothing else differs: then the rate is what is compared.
    """
    rates = list(dict.fromkeys(v.factors.get("optim.lr") for v in variants))
    alone = all(v.factors.keys() <= {"optim.lr"} for v in variants)
    if len(rates) < 2 or alone or ruler is None:
        return None

    def merit(rate: float) -> tuple[int, float]:
        scores = [s for v in at_rate(variants, rate) if (s := score_of(v, ruler)) is not None]
        return -len(scores), sum(scores) / len(scores) if scores else math.inf

    return min((rate for rate in rates if rate is not None), key=merit)


def scores_of(variant: Variant, ruler: Ruler) -> list[float]:
    """The scores of a variant, one a seed that has one."""
    return [s for s in map(ruler.of, variant.done) if s is not None]


def score_of(variant: Variant, ruler: Ruler) -> float | None:
    """The mean score of a variant over its seeds."""
    scores = scores_of(variant, ruler)
    return sum(scores) / len(scores) if scores else None


def differences(
    matched: Sequence[tuple[Variant, Variant]], of: Callable[[Run], float | None]
) -> list[float]:
    """Score of the first of each pair minus that of the second, averaged over pairs, one a shared seed."""
    by_seed: dict[int, list[float]] = {}
    for one, two in matched:
        for seed in one.seeds.keys() & two.seeds.keys():
            a, b = of(one.seeds[seed]), of(two.seeds[seed])
            if a is not None and b is not None:
                by_seed.setdefault(seed, []).append(a - b)
    whole = [found for _, found in sorted(by_seed.items()) if len(found) == len(matched)]
    return [sum(found) / len(found) for found in whole]


def most_seeds(matched: Sequence[tuple[Variant, Variant]]) -> list[tuple[Variant, Variant]]:
    """The pairs that share as many seeds as any pair does; a pair with fewer would cost all the rest."""
    shared = [one.seeds.keys() & two.seeds.keys() for one, two in matched]
    most = max(shared, key=len, default=set())
    return [pair for pair, seeds in zip(matched, shared, strict=True) if seeds and seeds >= most]


def comparable_times(done: Sequence[Run]) -> bool:
    """Whether times of these runs say something about the variants: one device, one run at a time."""
    alike = all(one_of(done, key) for key in ("device", "dtype", "threads", "compiled"))
    machines = {(run.environment.get("cpu"), run.environment.get("gpu")) for run in done}
    return alike and len(machines) <= 1 and side_by_side(done) <= {1}


def comparable_memory(done: Sequence[Run]) -> bool:
    return one_of(done, "device") and one_of(done, "dtype")


def judged(
    asked: dict[Any, list[tuple[Variant, Variant]]], of: Callable[[Run], float | None] | None
) -> dict[Any, Difference]:
    """A family of paired comparisons, judged together; those without a shared seed are left out."""
    if of is None:
        return {}
    found = {key: differences(matched, of) for key, matched in asked.items()}
    there = {key: paired(values) for key, values in found.items() if values}
    return dict(zip(there, family(list(there.values())), strict=True))


def comparisons_of(
    variants: Sequence[Variant],
    base: Variant,
    ruler: Ruler | None,
    clock: Callable[[Run], float | None] | None,
    *,
    memory: bool,
) -> list[Comparison]:
    """Each level of each factor against the baseline's, over all partners that both were tried with.

    A variant that differs from all others in more than one factor is set against the baseline itself.
    """
    asked: dict[tuple[str, str], list[tuple[Variant, Variant]]] = {}
    for factor in base.factors:
        for level in dict.fromkeys(plain(v.factors.get(factor)) for v in variants):
            at_base = plain(base.factors.get(factor))
            matched = (
                most_seeds(pairs(variants, factor, level, at_base)) if level != at_base else []
            )
            if matched:
                asked[factor, level] = matched
    covered = {id(v) for matched in asked.values() for pair in matched for v in pair}
    for v in variants:
        if v is not base and id(v) not in covered and (matched := most_seeds([(v, base)])):
            asked["", v.label] = matched
    quality, times = judged(asked, ruler.of if ruler else None), judged(asked, clock)
    counted = [key for key in COUNTED if memory or key != "peak_train_bytes"]
    return [
        Comparison(
            factor=factor,
            level=level,
            base=plain(base.factors.get(factor)) if factor else base.label,
            partners=[
                Variant({k: v for k, v in one.factors.items() if k != factor}).label
                for one, _ in matched
                if factor and len(one.factors) > 1
            ],
            quality=quality.get((factor, level)),
            time=times.get((factor, level)),
            ratios={key: mean_ratio(matched, key) for key in counted},
        )
        for (factor, level), matched in asked.items()
    ]


def mean_ratio(matched: Sequence[tuple[Variant, Variant]], key: str) -> float | None:
    """Geometric mean over pairs of what one variant has of a number to what the other has."""
    logs = []
    for one, two in matched:
        a, b = one.median(key), two.median(key)
        if not a or not b:
            return None
        logs.append(math.log(a / b))
    return math.exp(sum(logs) / len(logs)) if logs else None
