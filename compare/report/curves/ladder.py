"""How the differences of variants change with size, where a sweep has them at several sizes of the model."""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from compare.report import style
from compare.report.analysis import Metric, Study, score_table
from compare.report.curves.worth import compute_of
from compare.report.runs import Run
from compare.report.style import Drawing, Styles
from compare.report.tables import Rows, table_of
from compare.report.variants import Variant
from compare.statistics.ladder import DECADE, Prediction, Trend, line_weights, too_little, trends
from compare.statistics.paired import LEVEL, Difference, percent, percents, with_interval

HEADING = "By size"
Pair = tuple[Variant, Variant]  # a variant and the baseline of its size


@dataclass(frozen=True)
class Ladder:
    """A variant next to the baseline at several sizes, from the least compute to the most."""

    label: str
    sizes: list[float]  # non-embedding parameters of the baseline
    compute: list[float]  # training FLOPs of the baseline
    trend: Trend | None = None
    refused: str | None = None  # the reason why there is no trend


def log_above_entropy(run: Run) -> float | None:
    """The logarithm of the loss above that of a perfect model; None where that is not known."""
    loss, floor = run.get("val_loss"), run.get("entropy_floor")
    above = math.nan if loss is None or floor is None else loss - floor
    return math.log(above) if 0 < above < math.inf else None


ABOVE = Metric("val_loss", "loss above the entropy", log_above_entropy)


def measure_of(study: Study) -> Metric | None:
    """The loss above the entropy where that is known, else the metric of the study."""
    done = [run for v in study.compared for run in v.done]
    floors = [run.get("entropy_floor") for run in done]
    known = study.metric is not None and None not in floors
    return ABOVE if known else study.metric


def ladders(study: Study) -> list[Ladder]:
    """One for each variant; empty in a study without several sizes, or where compute was not counted."""
    measure = measure_of(study)
    if measure is None or not study.rungs:
        return []
    scores = score_table(study.variants, measure.score)
    compute = score_table(study.variants, compute_of).mean()
    found = [built(pairs, study, scores, compute) for pairs in climbs(study, compute)]
    judged = [(np.array(each.compute), d.to_numpy()) for each, d in found if not each.refused]
    found_trends = iter(trends(judged, looks=study.margin is not None))
    return [each if each.refused else replace(each, trend=next(found_trends)) for each, _ in found]


def climbs(study: Study, compute: pd.Series) -> list[list[Pair]]:
    """Each variant at each of its sizes, by the baseline's compute."""
    groups: dict[tuple[str, ...], list[Pair]] = {}
    for v in study.compared:
        own = study.baselines.get(v, v)
        if own is not v and not math.isnan(compute[own]):
            groups.setdefault(v.without(*study.rungs).levels, []).append((v, own))
    return [sorted(pairs, key=lambda pair: float(compute[pair[1]])) for pairs in groups.values()]


def built(
    pairs: list[Pair], study: Study, scores: pd.DataFrame, compute: pd.Series
) -> tuple[Ladder, pd.DataFrame]:
    """A ladder without its trend, and its differences: a row per seed that has all sizes."""
    each = {own: scores[v] - scores[own] for v, own in pairs}
    differences = pd.DataFrame(each).dropna(axis=1, how="all").dropna()
    spent = [float(compute[own]) for own in differences]
    sizes = [own.median("params_non_embedding") or 0.0 for own in differences]
    label = pairs[0][0].without(*study.rungs).label
    return Ladder(label, sizes, spent, refused=too_little(spent, len(differences))), differences


def ladder_table(study: Study) -> Rows:
    """A row per variant: its difference at each size, their slope, a word, and what is predicted."""
    found = ladders(study)
    sizes = sorted({size for each in found for size in each.sizes})
    digits = next(
        n for n in range(3, 18) if len({millions(size, n) for size in sizes}) == len(sizes)
    )
    return table_of(
        {
            "variant": each.label,
            **{millions(size, digits): at_size(each, size) for size in sizes},
            "per doubling": shown(each.trend.slope) if each.trend else "-",
            "with size": each.trend.word if each.trend else "-",
            "largest, from the others": shown(each.trend.last) if each.trend else "-",
            "ten times the compute": shown(each.trend.beyond) if each.trend else "-",
            "seeds": str(each.trend.slope.n) if each.trend else "-",
            "remark": each.refused or "",
        }
        for each in found
    )


def millions(parameters: float, digits: int = 3) -> str:
    return f"{parameters / 1e6:.{digits}g}M"


def at_size(each: Ladder, size: float) -> str:
    """The difference at a size; '-' for one without."""
    if each.trend is None or size not in each.sizes:
        return "-"
    return shown(each.trend.differences[each.sizes.index(size)])


def shown(d: Difference | Prediction | None) -> str:
    """A difference of logarithms and its interval in percent; '-' for none."""
    return "-" if d is None else with_interval(d.mean, d.low, d.high, percent)


def ladder_note(study: Study) -> str:
    """What the table shows."""
    measure = measure_of(study)
    unknown = (
        ""
        if measure is ABOVE
        else " The entropy of the text is not known: what is worth the same compute at every size fades "
        "in this measure as the loss nears it."
    )
    return (
        f"{measure.name.capitalize() if measure else ''} vs. {study.base_label}, by its non-embedding parameters; "
        f"the slope per doubling of its training compute, by lines of each seed; and the lines at {DECADE:g} times the "
        f"compute of the largest size, the end of what is predicted. {LEVEL:.0%} intervals over seeds; those of what is "
        f"predicted are for the mean of as many new seeds.{unknown}"
    )


def ladder_conclusions(study: Study) -> list[str]:
    """One sentence per variant: its word and what stands behind it, or why there is none."""
    measure = measure_of(study)
    name = measure.name if measure else ""
    return [sentence(each, study.base_label, name) for each in ladders(study)]


WORDS = {
    "persists": "persists with size",
    "grows": "grows with size",
    "fades": "fades with size",
    "not settled": "is not settled to persist, grow or fade with size",
}


def sentence(each: Ladder, base: str, measure: str) -> str:
    """The trend of a variant in words."""
    head = f"The difference of **{each.label}** from **{base}** in {measure}"
    if each.trend is None:
        return f"{head} is not judged by size: {each.refused}."
    t = each.trend
    return (
        f"{head} {WORDS[t.word]}: {shown(t.differences[0])} at {millions(each.sizes[0])} parameters, "
        f"{shown(t.differences[-1])} at {millions(each.sizes[-1])}, {shown(t.slope)} per doubling of compute; "
        f"predicted at {DECADE:g} times the compute, and no further: {shown(t.beyond)} "
        f"({LEVEL:.0%} intervals, {len(each.sizes)} sizes, {t.slope.n} seeds)."
    )


def ladder_figure(study: Study, _: Styles) -> Drawing | None:
    """The difference of each variant against training compute, with its line to one decade further."""
    found = [(each, each.trend) for each in ladders(study) if each.trend]
    measure = measure_of(study)
    if not found or measure is None:
        return None
    figure, axes = style.canvas(1, height=4.2)
    for i, (each, trend) in enumerate(found):
        draw(axes, each, trend, 1.04 ** (i - (len(found) - 1) / 2), i)
    compute = found[0][0].compute
    ticks = [*compute, DECADE * compute[-1]]
    axes.axhline(0, color=style.INK, linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:.1e}" for x in ticks])
    axes.minorticks_off()
    axes.set(
        xlabel=f"training compute of {study.baseline.without(*study.rungs).label}, FLOPs",
        ylabel=f"{measure.name} vs. {study.base_label}, %",
    )
    style.legend_below(figure, axes)
    return figure, (
        f"{measure.name.capitalize()} of each variant relative to {study.base_label}, by training compute: means with "
        f"{LEVEL:.0%} intervals over seeds, and the mean of the seeds' lines; below zero is better. Dashed: what the "
        f"lines predict, up to {DECADE:g} times the compute of the largest size, with the interval for as many new seeds."
    )


def draw(axes: Any, each: Ladder, trend: Trend, aside: float, i: int) -> None:
    """The differences of a variant in percent, moved by a factor in compute, and its line."""
    look = {"color": style.COLOURS[i % len(style.COLOURS)]}
    marker = style.MARKERS[i % len(style.MARKERS)]
    compute = np.array(each.compute)
    end = DECADE * compute[-1]
    shown_at: list[tuple[float, Difference | Prediction]] = [
        *zip(each.compute, trend.differences, strict=True),
        (end, trend.beyond),
    ]
    for x, d in shown_at:
        axes.vlines(x * aside, *percents([d.low, d.high]), **look)
    means = percents([d.mean for d in trend.differences])
    axes.plot(compute * aside, means, marker, label=each.label, **look)
    axes.plot([end * aside], percents([trend.beyond.mean]), marker, markerfacecolor="none", **look)
    for xs, form in (
        (np.geomspace(compute[0], compute[-1], 50), "-"),
        (np.geomspace(compute[-1], end, 50), "--"),
    ):
        line = [line_weights(compute, x) @ [d.mean for d in trend.differences] for x in xs]
        axes.plot(xs * aside, percents(line), form, linewidth=1.2, **look)
