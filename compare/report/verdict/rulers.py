"""What a published claim is measured by: scores of a variant and of the baseline, paired by seed."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from compare.report.analysis import PERPLEXITY, Study
from compare.report.curves.worth import worths
from compare.report.evaluations.exact_match import points
from compare.report.runs import Run
from compare.report.variants import Variant
from compare.statistics.paired import Difference, paired, percent, ratio
from train.config.options import Claim

Scores = dict[int, float]  # by seed


@dataclass(frozen=True)
class Ruler:
    """How a difference is found, and how it reads as text."""

    measure: Callable[[Study, Claim, Variant], Difference]
    show: Callable[[float], str]
    unit: str = ""  # of a difference; without one, it is the logarithm of a ratio
    over: tuple[str, ...] = ()  # factors whose levels it takes together


def by_seed(
    scores: Callable[[Study, Claim, Variant, int], Scores], answers: str | None = None
) -> Callable[[Study, Claim, Variant], Difference]:
    """A measure from the scores of two sides, 0 the variant and 1 the baseline, by seed.

    `answers` is the evaluation that the scores are from, if they are from one.
    """

    def measure(study: Study, claim: Claim, variant: Variant) -> Difference:
        sides = [scores(study, claim, v, side) for side, v in enumerate((variant, study.baseline))]
        shared = sorted(sides[0].keys() & sides[1].keys())
        if not shared:
            has = f"the answers of {answers}" if answers else "a result"
            raise ValueError(f"no seed of both, the variant and the baseline, has {has}")
        return paired([sides[0][seed] - sides[1][seed] for seed in shared])

    return measure


def quality(study: Study, claim: Claim, v: Variant, side: int) -> Scores:
    """Logarithms of perplexities at the end of training."""
    need_perplexity(study)
    scores = {seed: PERPLEXITY.score(run) for seed, run in v.seeds.items()}
    return {seed: score for seed, score in scores.items() if score is not None}


def at_context(study: Study, claim: Claim, v: Variant, side: int) -> Scores:
    """Losses of eval=length at the claim's context, with the positions scaled if it says so."""
    need_perplexity(study)
    found = {seed: loss_at(run, claim, side) for seed, run in v.seeds.items()}
    return {seed: loss for seed, loss in found.items() if loss is not None and math.isfinite(loss)}


def need_perplexity(study: Study) -> None:
    """Raise ValueError where perplexities do not compare."""
    if study.metric is not PERPLEXITY:
        measure = study.metric.name if study.metric else "no measure of quality"
        raise ValueError(f"the runs compare by {measure}, and not by perplexity")


def loss_at(run: Run, claim: Claim, side: int) -> float | None:
    rows = run.answer("length").get("rows", [])
    scheme = claim.scaled[side] if claim.scaled else None
    losses = [
        row["loss"]
        for row in rows
        if row["context"] == claim.context
        and (row["factor"] is None if scheme is None else row["pos"] == scheme and row["factor"])
    ]
    return losses[0] if losses else None


def exact_match(study: Study, claim: Claim, v: Variant, side: int) -> Scores:
    """Shares of right answers of eval=answers: the mean over the claim's levels, for seeds that have all."""
    found = {}
    for seed, run in v.seeds.items():
        groups = run.answer("answers").get("groups", {})
        shares = {name.partition(" ")[0]: group["accuracy"] for name, group in groups.items()}
        wanted = [*shares] if claim.levels is None else [str(level) for level in claim.levels]
        if wanted and shares.keys() >= {*wanted}:
            found[seed] = statistics.fmean(shares[level] for level in wanted)
    return found


def sensitivity(study: Study, claim: Claim, v: Variant, side: int) -> Scores:
    """How much a wrong learning rate costs: the mean over all rates of the loss above the best one's.

    A loss counts at most what it was before training, as that of a run that diverged (Wortsman et al.
    2023, https://arxiv.org/abs/2309.14322). Of the seeds that have a loss at every rate.
    """
    at_rates = [o for o in study.variants if alike(o, v)]
    losses: dict[int, list[float]] = {}
    for o in at_rates:
        for run in o.runs:
            if (loss := bounded_loss(run)) is not None:
                losses.setdefault(run.seed, []).append(loss)
    return {
        seed: statistics.fmean(found) - min(found)
        for seed, found in losses.items()
        if len(found) == len(at_rates) > 1
    }


def alike(one: Variant, two: Variant) -> bool:
    """True for variants that differ at most in their learning rate."""
    return one.without("optim.lr").levels == two.without("optim.lr").levels


def bounded_loss(run: Run) -> float | None:
    """The last validation loss, or the first one in the log if that is less or training diverged."""
    if not run.train:
        return None
    before = run.train[0][1]
    if run.done:
        loss = PERPLEXITY.score(run)
        return before if loss is None else min(before, loss)
    return before if "diverged" in str(run.status.get("reason")) else None


def compute(study: Study, claim: Claim, v: Variant) -> Difference:
    """The logarithm of the worth in the baseline's compute, over several numbers of steps."""
    label = v.without("steps").label
    found = [worth for worth in worths(study) if worth.label == label]
    if not found:
        raise ValueError(f"{label} has no worth in compute: that needs several numbers of steps")
    over = next((w.compute for w in found if len(w.steps) > 1 and w.compute), None)
    if over is None:
        reasons = dict.fromkeys(worth.refused for worth in found if worth.refused)
        why = "; ".join(reasons) or "it was trained for one number of steps, and several are needed"
        raise ValueError(f"the worth of {label} is refused: {why}")
    return over


RULERS = {
    "perplexity": Ruler(by_seed(quality), percent),
    "perplexity at a context": Ruler(by_seed(at_context, "eval=length"), percent),
    "exact match": Ruler(by_seed(exact_match, "eval=answers"), points, " points"),
    "compute": Ruler(compute, lambda d: f"{ratio(d):.3f}x", over=("steps",)),
    "rate sensitivity": Ruler(
        by_seed(sensitivity), lambda d: f"{d:+.2f}", " nats", over=("optim.lr",)
    ),
}
