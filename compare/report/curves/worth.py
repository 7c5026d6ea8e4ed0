"""The worth of variants in the baseline's compute and time, where a sweep has several numbers of steps."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from compare.report import style
from compare.report.analysis import BITS, STEP_TIME, Metric, Score, Study, score_from
from compare.report.runs import Run
from compare.report.style import Drawing, Styles
from compare.report.tables import Rows, table_of
from compare.report.variants import Variant
from compare.statistics.paired import LEVEL, Difference, paired, ratio, with_interval
from compare.statistics.worth import BEYOND, fit, log_more, no_curve, not_covered

HEADING = "Worth in compute and in time"
Look = dict[str, str]  # options of `axes.plot`


@dataclass(frozen=True)
class Budgets:
    """The finished runs of variants that differ in their steps alone, by number of steps."""

    label: str
    losses: pd.DataFrame  # a row per seed that has all of them, a column per number of steps
    compute: pd.Series  # training FLOPs, by number of steps
    log_ms: pd.DataFrame  # as the losses: logarithms of step times, NaN where they do not compare


@dataclass(frozen=True)
class Worth:
    """What a variant is worth at one budget, or over several: logarithms of ratios, paired by seed."""

    label: str
    steps: list[int]
    compute: Difference | None = None
    time: Difference | None = None  # None: times are not comparable
    refused: str | None = None  # the reason why there is no worth


def compute_of(run: Run) -> float | None:
    """Training FLOPs of all stages, counted: FLOPs per token times tokens; None if one is missing."""
    counts = [(stage.get("flops_per_token"), stage.get("tokens")) for stage in run.stages]
    return math.fsum(a * b for a, b in counts) if all(a and b for a, b in counts) else None


def loss_of(metric: Metric) -> Score:
    """The loss behind a metric, nats a token or bits a byte, of a run whose compute is known."""
    loss = score_from("val_bits_per_byte") if metric is BITS else metric.score
    return lambda run: None if compute_of(run) is None else loss(run)


def budgets(study: Study) -> list[Budgets]:
    """Those of a study, the baseline's first; empty where it has no seed with several numbers of steps,
    or where sizes differ, too.
    """
    if study.metric is None or "steps" not in study.baseline.factors or study.rungs:
        return []
    groups: dict[tuple[str, ...], list[Variant]] = {}
    for v in (study.baseline, *study.compared):
        if "steps" in v.factors:
            groups.setdefault(v.without("steps").levels, []).append(v)
    found = [budgets_of(variants, study) for variants in groups.values()]
    return found if found[0].losses.size > len(found[0].losses) else []


def budgets_of(variants: list[Variant], study: Study) -> Budgets:
    """The runs of variants that differ in their steps alone."""
    assert study.metric is not None
    variants = sorted(variants, key=lambda v: v.factors["steps"])
    losses = by_steps(variants, loss_of(study.metric)).dropna(axis=1, how="all").dropna()
    log_ms = by_steps(variants, STEP_TIME if study.times_compare else lambda _: None)
    compute = by_steps(variants, compute_of).mean()
    label = variants[0].without("steps").label
    return Budgets(label, losses, compute[losses.columns], log_ms.reindex_like(losses))


def by_steps(variants: list[Variant], score: Score) -> pd.DataFrame:
    """Scores of finished runs, a row per seed and a column per number of steps; NaN without one."""
    columns = {
        v.factors["steps"]: {seed: score(run) for seed, run in v.seeds.items()} for v in variants
    }
    return pd.DataFrame(columns, dtype=float).sort_index()


def worths(study: Study) -> list[Worth]:
    """The worth of each variant at each number of steps, and over all of them.

    Empty in a study without several numbers of steps. What is refused at one number of steps is left out of the last.
    """
    found = budgets(study)
    return [worth for other in found[1:] for worth in judged(found[0], other)]


def judged(base: Budgets, other: Budgets) -> list[Worth]:
    """The worth of a variant by the baseline's curve; one refusal if there is nothing to judge by."""
    steps = [n for n in base.losses if n in other.losses]
    seeds = base.losses.index.intersection(other.losses.index)
    reason = no_curve(base.compute.to_numpy(), base.losses.to_numpy())
    if reason is None and len(seeds) < 2:
        reason = f"seeds shared with the baseline's curve: {len(seeds)}, and an interval needs 2"
    if reason:
        return [Worth(other.label, steps, refused=reason)]
    own, reached = base.losses.loc[seeds], other.losses.reindex_like(base.losses.loc[seeds])
    factors = log_more(base.compute.to_numpy(), own.to_numpy(), reached.to_numpy())
    more = pd.DataFrame(factors, index=seeds, columns=own.columns)[steps]
    in_compute = more + np.log(base.compute / other.compute)
    in_time = more + (base.log_ms - other.log_ms)
    covered, found = [], []
    for n in steps:
        if reason := not_covered(base.compute.to_numpy(), base.compute[n], more[n].tolist()):
            found.append(Worth(other.label, [n], refused=reason))
        else:
            covered.append(n)
            found.append(worth_over([n], other.label, in_compute, in_time))
    return found + [worth_over(covered, other.label, in_compute, in_time)] * (len(covered) > 1)


def worth_over(
    steps: list[int], label: str, in_compute: pd.DataFrame, in_time: pd.DataFrame
) -> Worth:
    """The mean over some numbers of steps within each seed, and its interval over the seeds."""
    compute = in_compute[steps].mean(axis=1)
    time = in_time.loc[compute.index, steps].mean(axis=1, skipna=False)
    timed = None if time.isna().any() else paired(time.tolist())
    return Worth(label, steps, paired(compute.tolist()), timed)


def factor(d: Difference) -> str:
    """A worth and its interval: '1.12x (1.05 to 1.20)'."""
    text = with_interval(d.mean, d.low, d.high, lambda x: f"{ratio(x):.2f}")
    return text.replace(" ", "x ", 1)


def steps_in_words(worth: Worth) -> str:
    return ", ".join(f"{n:,}" for n in worth.steps)


def worth_table(study: Study) -> Rows:
    """A row per variant and number of steps, and one over all; empty in a study without several numbers of steps."""
    return table_of(
        {
            "variant": worth.label,
            "steps": steps_in_words(worth),
            "worth in compute": factor(worth.compute) if worth.compute else "-",
            "worth in time": factor(worth.time) if worth.time else untimed(worth),
            "seeds": str(worth.compute.n) if worth.compute else "-",
            "remark": worth.refused or "",
        }
        for worth in worths(study)
    )


def untimed(worth: Worth) -> str:
    return "-" if worth.refused else "not comparable"


def worth_note(study: Study) -> str:
    """What the table shows."""
    return (
        f"The compute that {base_label(study)} would need for the loss of a variant, by its own curve of loss "
        "against compute, divided by the compute that the variant used; and the same in time. Above 1 is better. "
        f"{LEVEL:.0%} intervals over seeds, each with a curve of its own, not corrected for their number."
    )


def base_label(study: Study) -> str:
    return study.baseline.without("steps").label


def worth_conclusions(study: Study) -> list[str]:
    """One sentence per variant: its worth over all that is judged, or why nothing is."""
    last: dict[str, Worth] = {}
    for worth in worths(study):
        if worth.compute or worth.label not in last:
            last[worth.label] = worth
    return [sentence(worth, base_label(study)) for worth in last.values()]


def sentence(worth: Worth, base: str) -> str:
    """The worth of a variant in words."""
    if worth.compute is None:
        return f"The worth of **{worth.label}** in the compute of **{base}** is not judged: {worth.refused}."
    time = f", {factor(worth.time)} of its time" if worth.time else ""
    return (
        f"**{worth.label}** is worth {factor(worth.compute)} of the compute of **{base}**{time} "
        f"({LEVEL:.0%} intervals, steps {steps_in_words(worth)}, {worth.compute.n} seeds)."
    )


def worth_figure(study: Study, _: Styles) -> Drawing | None:
    """Loss against training compute with the baseline's curve, and what each variant is worth."""
    found, drawn = worths(study), budgets(study)
    if not any(worth.compute for worth in found):
        return None
    figure, (left, right) = style.canvas(2, height=3.8)
    looks = {
        each.label: {
            "color": style.COLOURS[i % len(style.COLOURS)],
            "marker": style.MARKERS[i % len(style.MARKERS)],
        }
        for i, each in enumerate(drawn)
    }
    for each in drawn:
        draw_losses(left, each, looks[each.label])
    draw_curve(left, drawn[0], looks[drawn[0].label])
    left.set(ylabel=f"loss, {'bits a byte' if study.metric is BITS else 'nats a token'}")
    draw_worths(right, found, looks)
    style.legend_below(figure, left)
    base = base_label(study)
    return figure, (
        f"Left: loss against training compute, means and ranges over seeds; the line is the curve of {base}, as far "
        f"as it is used. Right: the compute that {base} would need for the same loss, over the compute used, by "
        f"steps, with {LEVEL:.0%} intervals; above 1 is better."
    )


def draw_losses(axes: Any, each: Budgets, look: Look) -> None:
    """The mean losses of a variant by its compute, with their range over seeds."""
    losses = each.losses
    axes.plot(each.compute, losses.mean(), linestyle="", label=each.label, **look)
    axes.vlines(each.compute, losses.min(), losses.max(), color=look["color"], alpha=0.5)


def draw_curve(axes: Any, base: Budgets, look: Look) -> None:
    """The curve through the baseline's mean losses, and its compute as ticks."""
    compute = base.compute.to_numpy()
    wide = np.geomspace(compute.min() / BEYOND, compute.max() * BEYOND, 100)
    curve = fit(compute, base.losses.mean().to_numpy())
    axes.plot(wide, curve.loss(wide), color=look["color"])
    axes.set_xscale("log")
    axes.set_xticks(compute, [f"{x:.1e}" for x in compute])
    axes.minorticks_off()
    axes.set(xlabel="training compute, FLOPs")


def draw_worths(axes: Any, found: list[Worth], looks: dict[str, Look]) -> None:
    """The worth of each variant by steps and over all of them, side by side, with intervals."""
    steps = sorted({n for worth in found for n in worth.steps})
    names, labels = [*map(str, steps), "all"], list(dict.fromkeys(worth.label for worth in found))
    for worth in found:
        if (d := worth.compute) and d.low is not None and d.high is not None:
            place = steps.index(worth.steps[0]) if len(worth.steps) == 1 else len(steps)
            x = place + 0.5 * ((labels.index(worth.label) + 0.5) / len(labels) - 0.5)
            axes.vlines(x, ratio(d.low), ratio(d.high), color=looks[worth.label]["color"])
            axes.plot([x], [ratio(d.mean)], linestyle="", **looks[worth.label])
    axes.axhline(1, color=style.INK, linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="steps", ylabel="worth in compute")
