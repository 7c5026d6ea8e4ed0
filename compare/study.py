"""Runs compared: which variant differs from which in what, by how much, and how surely."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from compare.doubts import doubts
from compare.results import Run, Variant, is_baseline, pairs, plain, read, variants_of
from compare.statistics import Difference, family, paired
from train.record import read_json


@dataclass(frozen=True)
class Ruler:
    """What quality is measured in: a run's score, lower is better, on a scale of logarithms."""

    key: str  # of the summary
    name: str
    of: Callable[[Run], float | None]


def log_of(key: str) -> Callable[[Run], float | None]:
    def score(run: Run) -> float | None:
        value = run.get(key)
        return math.log(value) if value else None

    return score


PERPLEXITY = Ruler("val_perplexity", "perplexity", lambda run: run.get("val_loss"))
BITS = Ruler("val_bits_per_byte", "bits per byte", log_of("val_bits_per_byte"))
TRAINING = Ruler("train_loss", "training perplexity", lambda run: run.get("train_loss"))


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

    title: str
    figure: str | None
    variants: list[Variant]
    baseline: Variant
    ruler: Ruler | None  # None: no quality can be compared
    rate: float | None  # the learning rate that all are compared at, where several were tried
    rows: dict[int, Difference]  # of each variant to the baseline, by its place among variants
    times: dict[int, Difference]
    comparisons: list[Comparison]
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
    found = examine(read(folders), baseline or sweep.get("baseline"), named=baseline is not None)
    return replace(found, title=sweep.get("title") or folders[0].name, figure=sweep.get("figure"))


def examine(runs: Sequence[Run], baseline: str | None = None, *, named: bool = False) -> Study:
    """Compare runs. A baseline that was `named` must be among them; another gives way to the first."""
    variants, confounded = variants_of(runs)
    base = choose_baseline(variants, baseline, must=named)
    done = [run for run in runs if run.done]
    ruler = ruler_of(done)
    rate = shared_rate(variants, ruler)
    compared = at_rate(variants, rate)
    if base not in compared:
        at_shared = pairs(variants, "optim.lr", base.factors["optim.lr"], rate)
        base = next((two for one, two in at_shared if one is base), compared[0])
    others = [(variants.index(v), v) for v in compared if v is not base]
    rows = judged({i: [(v, base)] for i, v in others}, ruler.of if ruler else None)
    times = judged({i: [(v, base)] for i, v in others}, log_of("step_ms"))
    return Study(
        title="",
        figure=None,
        variants=variants,
        baseline=base,
        ruler=ruler,
        rate=rate,
        rows=rows,
        times=times,
        comparisons=comparisons_of(compared, base, ruler),
        warnings=list(doubts(runs, variants, confounded)),
    )


def choose_baseline(variants: list[Variant], text: str | None, *, must: bool) -> Variant:
    """The variant that a text names; without one, or if it is not there and need not be, the first."""
    wanted = dict(part.split("=", 1) for part in (text or "").split() if "=" in part)
    found = [v for v in variants if is_baseline(v, wanted)] if wanted else []
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
    """Of several learning rates the one that is best on average over variants.

    None if one was tried, or if nothing else differs: then the rate is what is compared.
    """
    rates = list(dict.fromkeys(v.factors.get("optim.lr") for v in variants))
    alone = all(v.factors.keys() <= {"optim.lr"} for v in variants)
    if len(rates) < 2 or alone or ruler is None:
        return None
    means = {rate: [score_of(v, ruler) for v in at_rate(variants, rate)] for rate in rates}
    whole = {r: [m for m in found if m is not None] for r, found in means.items()}
    complete = {
        r: sum(found) / len(found) for r, found in whole.items() if len(found) == len(means[r])
    }
    return min(complete, key=complete.__getitem__) if complete else rates[0]


def score_of(variant: Variant, ruler: Ruler) -> float | None:
    """The mean score of a variant over its seeds."""
    scores = [s for s in map(ruler.of, variant.done) if s is not None]
    return sum(scores) / len(scores) if scores else None


def differences(
    matched: Sequence[tuple[Variant, Variant]], score: Callable[[Run], float | None]
) -> list[float]:
    """Score of the first of each pair minus that of the second, averaged over pairs, one a shared seed."""
    pairs_by_seed: dict[int, list[float]] = {}
    for one, two in matched:
        for seed in one.seeds.keys() & two.seeds.keys():
            a, b = score(one.seeds[seed]), score(two.seeds[seed])
            if a is not None and b is not None:
                pairs_by_seed.setdefault(seed, []).append(a - b)
    whole = [found for _, found in sorted(pairs_by_seed.items()) if len(found) == len(matched)]
    return [sum(found) / len(found) for found in whole]


def judged(
    asked: dict[Any, list[tuple[Variant, Variant]]], score: Callable[[Run], float | None] | None
) -> dict[Any, Difference]:
    """A family of paired comparisons, judged together; those without a shared seed are left out."""
    if score is None:
        return {}
    found = {key: differences(matched, score) for key, matched in asked.items()}
    there = {key: paired(values) for key, values in found.items() if values}
    return dict(zip(there, family(list(there.values())), strict=True))


def comparisons_of(
    variants: Sequence[Variant], base: Variant, ruler: Ruler | None
) -> list[Comparison]:
    """Each level of each factor against the baseline's, over all partners that both were tried with."""
    asked = {}
    for factor in base.factors:
        for level in dict.fromkeys(v.factors.get(factor) for v in variants):
            matched = pairs(variants, factor, level, base.factors.get(factor))
            matched = [(a, b) for a, b in matched if a is not b and a.seeds.keys() & b.seeds.keys()]
            if matched:
                asked[factor, plain(level)] = matched
    quality = judged(asked, ruler.of if ruler else None)
    times = judged(asked, log_of("step_ms"))
    return [
        Comparison(
            factor=factor,
            level=level,
            base=plain(base.factors.get(factor)),
            partners=[
                Variant({k: v for k, v in one.factors.items() if k != factor}).label
                for one, _ in matched
                if len(one.factors) > 1
            ],
            quality=quality.get((factor, level)),
            time=times.get((factor, level)),
            ratios={key: mean_ratio(matched, key) for key in COUNTED},
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
