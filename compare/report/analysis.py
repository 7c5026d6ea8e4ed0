"""Variants compared: differences in quality and time, paired by seed, and ratios of costs."""

import itertools
import math
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from compare.report.caveats import caveats, runs_at_once, same
from compare.report.runs import Run, read
from compare.report.variants import (
    Variant,
    baselines_of,
    is_baseline,
    pairs,
    plain,
    rungs_of,
    variants_of,
)
from compare.statistics.paired import LARGEST, Difference, correct, paired
from compare.statistics.sequential import Decision, decide
from train.config.compose import parse
from train.config.old_spellings import current_overrides
from train.record.run_folder import load_manifest
from train.sweep.expand import ROUNDS

Key = TypeVar("Key")
Pairs = Sequence[tuple[Variant, Variant]]
Question = tuple[str, str]  # a factor and its level, or nothing and a variant's label
Score = Callable[[Run], float | None]


@dataclass(frozen=True)
class Metric:
    """A measure of quality: a score per run, lower is better, on a logarithmic scale."""

    key: str  # of the summary
    name: str
    score: Score


def score_from(key: str, *, log: bool = False) -> Score:
    """A number of a run's summary, or its logarithm; None unless it and its exp are finite."""

    def score(run: Run) -> float | None:
        value = run.get(key)
        if value is None or not math.isfinite(value) or (log and value <= 0):
            return None
        result = math.log(value) if log else float(value)
        return result if abs(result) < LARGEST else None

    return score


PERPLEXITY = Metric("val_perplexity", "perplexity", score_from("val_loss"))
BITS = Metric("val_bits_per_byte", "bits per byte", score_from("val_bits_per_byte", log=True))
TRAINING = Metric("train_loss", "training perplexity", score_from("train_loss"))
STEP_TIME = score_from("step_ms", log=True)


@dataclass(frozen=True)
class Comparison:
    """A level of a factor against the baseline's level, all else equal."""

    factor: str
    level: str
    base: str
    partners: list[str]  # labels of the other factors that it is averaged over
    quality: Difference | None  # in scores of the metric, level minus base
    time: Difference | None  # in the logarithm of the step time
    decision: Decision | None  # where seeds came in rounds and there are enough
    ratios: dict[str, float | None]  # level / base of counts, which have no noise


@dataclass(frozen=True, eq=False)  # one is itself alone, so that what follows from it can be kept
class Study:
    """The results of a report, before they are laid out."""

    variants: list[Variant]
    baseline: Variant
    rungs: list[str]  # factors that follow from the model's size, see `rungs_of`
    baselines: dict[Variant, Variant]  # that each variant is compared with
    metric: Metric | None  # None: quality is not comparable
    rate: float | None  # the learning rate of the comparisons, where several were tried
    scores: pd.DataFrame  # of finished runs: a row per seed, a column per variant; NaN without one
    differences: dict[Variant, Difference]  # in scores, from its baseline
    times: dict[Variant, Difference]  # in the logarithm of the step time, from its baseline
    questions: Mapping[Question, Pairs]  # what is compared, see `questions_of`
    comparisons: list[Comparison]
    times_compare: bool
    margin: float | None  # of quality, relative, where seeds came in rounds
    warnings: list[str]

    @property
    def over(self) -> bool:
        """True unless a run is still to come."""
        return all(run.over for v in self.variants for run in v.runs)

    @property
    def compared(self) -> list[Variant]:
        """The variants at the shared learning rate; all, if one was tried."""
        return at_rate(self.variants, self.rate)

    @property
    def base_label(self) -> str:
        """What variants are compared with, in words."""
        if not self.rungs:
            return self.baseline.label
        return f"{self.baseline.without(*self.rungs).label} of the same size"

    @property
    def quality(self) -> pd.Series:
        """Perplexity or bits per byte of each variant that has it: exp of its mean score."""
        return np.exp(self.scores.mean().dropna())


COUNTED = ("kv_cache_bytes_per_token", "peak_train_bytes", "params", "flops_per_token")


def analyse_folders(folders: Sequence[Path], baseline: str | None = None) -> Study:
    """Read runs and compare them. `baseline` names a variant, as "attn=mha pos=rope".

    Raises ValueError if there are no runs, or no such baseline among them.
    """
    sweep = load_manifest(folders[0])
    return analyse(
        read(folders),
        baseline or sweep.get("baseline"),
        required=baseline is not None,
        margin=sweep.get("margin"),
    )


def analyse(
    runs: Sequence[Run],
    baseline: str | None = None,
    *,
    required: bool = False,
    margin: float | None = None,
) -> Study:
    """Compare runs. Without the `baseline`, the first variant is one, unless it is `required`.

    With the `margin` of runs whose seeds came in rounds, tests allow for the looks at them.
    """
    variants, confounded = variants_of(runs)
    base = choose_baseline(variants, baseline, required=required)
    done = [run for run in runs if run.done]
    metric = metric_of(done)
    times_compare = comparable_times(done)
    scores = score_table(variants, metric.score if metric else None)
    log_ms = score_table(variants, STEP_TIME if times_compare else None)
    rate = shared_rate(scores)
    compared = at_rate(variants, rate)
    if base not in compared:
        at_shared = pairs(variants, "optim.lr", base.level("optim.lr"), plain(rate))
        base = next((two for one, two in at_shared if one is base), compared[0])
    rungs = rungs_of(compared, base)
    baselines = baselines_of(variants, base, rungs)
    with_base = {v: [(v, own)] for v in compared if (own := baselines.get(v, v)) is not v}
    looks = margin is not None
    of_its_size = {v: baselines[v] for v in compared if v in baselines} if rungs else {}
    questions = questions_of(compared, base, of_its_size, looks=looks)
    quality = family_tests(questions, scores, looks=looks)
    times = family_tests(questions, log_ms, looks=looks)
    counted = [key for key in COUNTED if key != "peak_train_bytes" or comparable_memory(done)]
    return Study(
        variants=variants,
        baseline=base,
        rungs=rungs,
        baselines=baselines,
        metric=metric,
        rate=rate,
        scores=scores,
        differences=family_tests(with_base, scores, looks=looks),
        times=family_tests(with_base, log_ms, looks=looks),
        questions=questions,
        comparisons=[
            Comparison(
                factor=factor,
                level=level,
                base=base.level(factor) if factor else matched[0][1].label,
                partners=[
                    one.without(factor).label
                    for one, _ in matched
                    if factor and len(one.factors) > 1
                ],
                quality=quality.get((factor, level)),
                time=times.get((factor, level)),
                decision=decision(matched, scores, margin, len(questions)),
                ratios={key: mean_ratio(matched, key) for key in counted},
            )
            for (factor, level), matched in questions.items()
        ],
        times_compare=times_compare,
        margin=margin,
        warnings=list(caveats(runs, variants, confounded, rungs)),
    )


def choose_baseline(variants: list[Variant], text: str | None, *, required: bool) -> Variant:
    """The variant that a text names, or the first one if there is none and none is required."""
    wanted = wanted_by(text or "")
    named = [v for v in variants if wanted and is_baseline(v, wanted)]
    if required and not named:
        raise ValueError(
            f"baseline={text}: no such variant here; there are {', '.join(v.label for v in variants)}"
        )
    done = [v for v in named if v.done] or (named if required else [])
    return (done or [v for v in variants if v.done] or variants)[0]


def wanted_by(text: str) -> dict[str, Any]:
    """The settings in the name of a variant: {"attn": "mha", "pos": "rope"} of "attn=mha pos=rope"."""
    asked = current_overrides("train", shlex.split(text))
    return {o.key_or_group: o.value() for o in parse(asked)}


def metric_of(done: Sequence[Run]) -> Metric | None:
    """Perplexity; bits per byte across tokenizers; None across corpora."""
    texts = {run.get("data_fingerprint") for run in done}
    if len(texts) != 1:
        return None
    if all(run.get("val_loss") is None for run in done):
        return TRAINING if any(run.get("train_loss") is not None for run in done) else None
    return PERPLEXITY if len({run.get("tokenizer_sha256") for run in done}) == 1 else BITS


def score_table(variants: Sequence[Variant], score: Score | None) -> pd.DataFrame:
    """Scores of finished runs, a row per seed and a column per variant; NaN without one."""
    return pd.DataFrame(
        {
            v: pd.Series({seed: score(run) for seed, run in v.seeds.items() if score}, dtype=float)
            for v in variants
        }
    )


def at_rate(variants: Sequence[Variant], rate: float | None) -> list[Variant]:
    return [v for v in variants if rate is None or v.factors.get("optim.lr") == rate]


def shared_rate(scores: pd.DataFrame) -> float | None:
    """Of the learning rates tried with most variants, the one with the best mean over them.

    None if one was tried, or if nothing else differs: then rates are what is compared.
    """
    rates = [v.factors.get("optim.lr") for v in scores]
    alone = all(v.factors.keys() <= {"optim.lr"} for v in scores)
    if len(set(rates)) < 2 or alone or scores.isna().all(axis=None):
        return None
    by_rate = scores.mean().groupby(rates, sort=False).agg(["count", "mean"])
    return float(by_rate.sort_values(["count", "mean"], ascending=[False, True]).index[0])


def paired_differences(matched: Pairs, scores: pd.DataFrame) -> list[float]:
    """Score of the first of each pair minus that of the second, averaged over pairs, per seed.

    Of the seeds that all of them have.
    """
    rows = [scores[one].to_numpy() - scores[two].to_numpy() for one, two in matched]
    means = np.mean(rows, axis=0)  # NaN where a score is missing
    return [float(mean) for mean in means[~np.isnan(means)]]


def decision(
    matched: Pairs, scores: pd.DataFrame, margin: float | None, questions: int
) -> Decision | None:
    """What the seeds so far say to one of so many questions; None before the first look."""
    differences = paired_differences(matched, scores)
    if margin is None or len(differences) < ROUNDS[0]:
        return None
    return decide(differences, math.log1p(margin), questions)


def undecided(folder: Path) -> list[str]:
    """The runs of a sweep, by name, that are part of a question that needs more seeds."""
    study = analyse_folders([folder])
    if study.metric is None:  # no seeds will settle that
        return []
    over = {(c.factor, c.level) for c in study.comparisons if c.decision and c.decision.over}
    going = {
        v
        for key, matched in study.questions.items()
        if key not in over
        for pair in matched
        for v in pair
    }
    return [run.folder.name for v in going for run in v.runs]


def family_tests(
    questions: Mapping[Key, Pairs], scores: pd.DataFrame, *, looks: bool = False
) -> dict[Key, Difference]:
    """Paired tests, corrected together, see `correct`; questions without a shared seed are left out."""
    values = {key: paired_differences(matched, scores) for key, matched in questions.items()}
    tests = {key: paired(differences) for key, differences in values.items() if differences}
    return dict(zip(tests, correct(list(tests.values()), looks=looks), strict=True))


def comparable_times(done: Sequence[Run]) -> bool:
    """True for runs of one device and its settings, which ran one at a time."""
    machines = {(run.environment.get("cpu"), run.environment.get("gpu")) for run in done}
    alike = all(same(done, key) for key in ("device", "dtype", "threads", "compiled"))
    return alike and len(machines) <= 1 and runs_at_once(done) <= {1}


def comparable_memory(done: Sequence[Run]) -> bool:
    return same(done, "device") and same(done, "dtype")


def questions_of(
    variants: Sequence[Variant],
    base: Variant,
    own: Mapping[Variant, Variant],
    *,
    looks: bool = False,
) -> dict[Question, Pairs]:
    """Each (factor, level) with its pairs: the level and the baseline's, with all shared partners.

    Of these, the ones that share the most seeds, as one with fewer would cost the others theirs. But with
    `looks` all: where seeds come in rounds, a question that was answered with some pairs keeps them,
    and so its answer, while some of them go on.
    A variant that differs from all others in more than one factor is compared with the baseline
    itself, under ("", its label). So is, on a ladder, each variant with its `own`, that of its size.
    """
    least = ROUNDS[0] if looks else None
    if own:
        at_rungs = {
            ("", v.label): sharing_seeds([(v, b)], least) for v, b in own.items() if v is not b
        }
        return {key: matched for key, matched in at_rungs.items() if matched}
    questions: dict[Question, Pairs] = {}
    for factor in base.factors:
        for level in dict.fromkeys(v.level(factor) for v in variants):
            at_base = base.level(factor)
            matched = pairs(variants, factor, level, at_base) if level != at_base else []
            questions[factor, level] = sharing_seeds(matched, least)
    covered = {v for matched in questions.values() for pair in matched for v in pair}
    for v in variants:
        if v is not base and v not in covered:
            questions["", v.label] = sharing_seeds([(v, base)], least)
    return {key: matched for key, matched in questions.items() if matched}


def sharing_seeds(matched: Pairs, least: int | None) -> Pairs:
    """The pairs that share at least so many seeds; those that share the most if none does, or for None."""
    shared = [one.seeds.keys() & two.seeds.keys() for one, two in matched]
    enough = [len(seeds) >= least for seeds in shared] if least is not None else []
    if any(enough):
        return list(itertools.compress(matched, enough))
    most = max(shared, key=len, default=set())
    return [pair for pair, seeds in zip(matched, shared, strict=True) if seeds and seeds >= most]


def mean_ratio(matched: Pairs, key: str) -> float | None:
    """Geometric mean over pairs of the ratio of their medians; None if one is missing or 0."""
    medians = [(one.median(key), two.median(key)) for one, two in matched]
    ratios = [a / b for a, b in medians if a and b]
    return statistics.geometric_mean(ratios) if len(ratios) == len(matched) else None
