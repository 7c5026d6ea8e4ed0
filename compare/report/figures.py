"""The figures of a report."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure as Canvas

from compare.cost.counts import DecodingCost, decoding_costs
from compare.report import style
from compare.report.analysis import Study
from compare.report.curves.ladder import ladder_figure
from compare.report.curves.worth import worth_figure
from compare.report.evaluations.kinds import evaluation, kinds
from compare.report.style import Draw, Drawing, Figure, Styles
from compare.report.variants import Variant
from compare.statistics.paired import LEVEL, percents
from train.config.options import Reporting

#: Costs that figures show: scale and label.
COSTS = {
    "train_seconds": (1.0, "training time, s"),
    "attention_ms": (1.0, "attention, ms an iteration"),
    "peak_train_bytes": (2**-20, "peak training memory, MiB"),
    "kv_cache_bytes_per_token": (1.0, "KV cache, bytes a token"),
}


def figures(study: Study, report: Reporting) -> list[Figure]:
    """All figures that these runs can fill; the one that the report leads with first."""
    styles = style.styles_of(study)
    draws = FIGURES | {kind: evaluation(kind, study).draw for kind in kinds()}
    drawn = [f for name, draw in draws.items() if (f := style.render(name, draw, study, styles))]
    drawn.sort(key=lambda figure: figure.name != report.figure)
    if report.figure_file and drawn and drawn[0].name == report.figure:
        title = f"{report.title}. " if report.title else ""
        drawn[0] = replace(drawn[0], name=report.figure_file, caption=title + drawn[0].caption)
    return drawn


def files_of(report: Reporting) -> list[str]:
    """The files that `figures` may name."""
    names = {*FIGURES, *kinds(), report.figure_file} - {None}
    return sorted(f"{name}.svg" for name in names)


def training_figure(study: Study, styles: Styles) -> Drawing | None:
    """Training loss against iterations, the stages of a run as one curve."""
    curves, ends = curves_of(study, "train"), stage_ends(study)
    if not curves:
        return None
    unmarked = {v: replace(look, marker="") for v, look in styles.items()}
    smoothed = {v: smooth(losses, ends) for v, losses in curves.items()}
    figure, axes, notes = draw_curves(smoothed, ends, unmarked, "training loss, nats a token")
    # The first steps would flatten all that follows.
    late = pd.concat(x[x.index > 0.02 * x.index[-1]].stack() for x in curves.values())
    set_range(axes, late.min(), late.quantile(0.98, interpolation="higher"))
    return figure, f"Training loss, nats a token. Each point is the mean of its steps.{notes}"


def validation_figure(study: Study, styles: Styles) -> Drawing | None:
    """Validation loss against iterations, with that of the run that gave the weights."""
    curves, ends = curves_of(study, "val"), stage_ends(study)
    if not curves:
        return None
    figure, axes, notes = draw_curves(curves, ends, styles, "validation loss, nats a token")
    origins = {run.stages[0].origin_loss for v in curves for run in v.runs} - {None}
    for loss in origins:
        axes.axhline(loss, color=style.INK, linewidth=0.8, linestyle=":")
    every = pd.concat([pd.Series(list(origins)), *(x.stack() for x in curves.values())])
    set_range(axes, every.min(), every.max())
    notes += " The dotted line is the run that gave the weights." if origins else ""
    return figure, f"Validation loss, nats a token.{notes}"


def curves_of(study: Study, split: str) -> dict[Variant, pd.DataFrame]:
    """Losses of each variant, a row per step and a column per run with several of them."""
    histories = {v: [run.history(split) for run in v.done or v.runs] for v in study.compared}
    curves = {v: [pd.Series(dict(h)) for h in hs if len(h) > 1] for v, hs in histories.items()}
    return {v: pd.concat(runs, axis=1).sort_index() for v, runs in curves.items() if runs}


def stage_ends(study: Study) -> list[int]:
    """The iterations after which runs went on with their next stage."""
    steps = [[s.summary.get("steps", 0) for s in r.stages] for v in study.compared for r in v.runs]
    return sorted({end for stages in steps for end in accumulate(stages[:-1]) if end})


def smooth(losses: pd.DataFrame, ends: Sequence[int], points: int = 100) -> pd.DataFrame:
    """Means over equal numbers of steps, none of them across the end of a stage."""
    steps = losses.index.to_numpy()
    starts, stage = np.array([steps[0] - 1, *ends]), np.searchsorted(ends, steps)
    width = max(1, (steps[-1] - starts[0]) // points)
    parts = [stage, (steps - starts[stage] - 1) // width]
    middle = pd.Series(steps).groupby(parts).mean().round()
    return losses.groupby(parts).mean().set_axis(middle)


def draw_curves(
    curves: dict[Variant, pd.DataFrame], ends: Sequence[int], styles: Styles, label: str
) -> tuple[Canvas, Any, str]:
    """The mean and range over runs of each variant; the figure, its axes, and notes for a caption."""
    figure, axes = style.canvas(1, height=4.2)
    notes = ""
    for v, losses in curves.items():
        axes.plot(losses.mean(axis=1), label=v.label, linewidth=1.4, **styles[v].plot)
        if losses.shape[1] > 1:
            low, high, colour = losses.min(axis=1), losses.max(axis=1), styles[v].colour
            axes.fill_between(losses.index, low, high, color=colour, alpha=0.15, linewidth=0)
            notes = " Bands span the seeds."
    for step in ends:
        axes.axvline(step, color=style.INK, linewidth=0.8, alpha=0.5)
    axes.set(xlabel="iterations", ylabel=label)
    style.legend(axes, len(curves))
    return figure, axes, notes + " The vertical line is where the next stage starts." * bool(ends)


def set_range(axes: Any, low: float, high: float) -> None:
    """Show a range of losses, with a margin."""
    axes.set_ylim(low - 0.02 * abs(low), high + 0.02 * abs(high))


def quality_figure(study: Study, styles: Styles) -> Drawing | None:
    """Quality against training time, memory and KV cache."""
    metric, quality = study.metric, study.quality
    keys = ["peak_train_bytes", "kv_cache_bytes_per_token"]
    keys = ["train_seconds", *keys] if study.times_compare else keys
    shown = [v for v in study.compared if v in quality]
    costs = pd.DataFrame({key: {v: v.median(key) for v in shown} for key in keys}, dtype=float)
    keys = [key for key in keys if costs[key].count() > 1]
    if metric is None or not keys:
        return None
    figure, panels = style.canvas(len(keys), height=3.6)
    panels = np.atleast_1d(panels)
    for axes, key in zip(panels, keys, strict=True):
        scale, label = COSTS[key]
        points = {v: (scale * x, quality[v]) for v, x in costs[key].dropna().items()}
        for v, (x, y) in points.items():
            seeds, colour = np.exp(study.scores[v]), styles[v].colour
            axes.vlines(x, seeds.min(), seeds.max(), color=colour, alpha=0.5)
            axes.plot([x], [y], styles[v].marker, color=colour, label=v.label)
        front = np.array(pareto(list(points.values()))).reshape(-1, 2)
        axes.plot(*front.T, color=style.INK, linewidth=0.8, alpha=0.5, drawstyle="steps-post")
        axes.set(xlabel=label)
        low, high = (f(x for x, _ in points.values()) for f in (min, max)) if points else (0, 0)
        if high - low < 0.02 * high:  # as good as equal: not to be shown as far apart
            axes.set_xlim(0.9 * high, 1.1 * high)
    panels[0].set(ylabel=metric.name)
    style.legend_below(figure, panels[0])
    return figure, (
        f"{metric.name.capitalize()} against cost; lower and further left is better. The grey steps are the Pareto "
        "front: no other variant is better in both. Points are the mean over seeds in quality and the median in "
        "cost, bars the range over seeds."
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def differences_figure(study: Study, styles: Styles) -> Drawing | None:
    """The difference of each variant from the baseline, with its interval."""
    shown = study.differences
    if study.metric is None or all(d.low is None for d in shown.values()):
        return None
    figure, axes = style.canvas(1, height=1.2 + 0.32 * len(shown))
    for row, (v, d) in enumerate(reversed(shown.items())):
        colour = styles[v].colour
        if d.low is not None and d.high is not None:
            axes.hlines(row, *percents([d.low, d.high]), color=colour, linewidth=2)
        fill = colour if d.significant else "none"
        axes.plot(percents([d.mean]), [row], "o", color=colour, markerfacecolor=fill)
    axes.axvline(0, color=style.INK, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [v.label for v in reversed(shown)])
    axes.set(xlabel=f"{study.metric.name} vs. {study.base_label}, %")
    return figure, (
        f"Difference from {study.base_label}, paired by seed, with {LEVEL:.0%} intervals; left of zero is "
        "better. Filled points are significant after Holm's correction."
    )


HEADS = ("attn", "attn.n_kv_heads")  # factors that set the number of KV heads


def heads_figure(study: Study, styles: Styles) -> Drawing | None:
    """Attention time, memory and cache by KV heads."""
    keys = ("attention_ms", "peak_train_bytes", "kv_cache_bytes_per_token")
    rows = pd.DataFrame(
        {"variant": v, "others": v.without(*HEADS).label, "module": module_of(v), "heads": heads}
        | {key: v.median(key) for key in keys}
        for v in study.compared
        if isinstance(heads := v.first("n_kv_heads"), int) and v.median("attention_ms") is not None
    )
    lines = rows.groupby(["module", "others"], sort=False) if len(rows) else []
    shown = [line.sort_values("heads") for _, line in lines if line.heads.nunique() > 1]
    if not shown:
        return None
    figure, panels = style.canvas(3, height=3.6)
    for axes, key in zip(panels, keys, strict=True):
        scale, label = COSTS[key]
        for i, line in enumerate(shown):
            hues = {styles[v].colour for v in line.variant}
            axes.plot(line.heads, scale * line[key].astype(float), label=line.others.iloc[0],
                      marker=style.MARKERS[i % len(style.MARKERS)], linestyle=style.LINES[i % len(style.LINES)],
                      color=hues.pop() if len(hues) == 1 else style.GREY)  # fmt: skip
        axes.set_xticks(sorted(set(pd.concat(shown).heads)))
        axes.set(xlabel="KV heads", ylabel=label)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if len(shown) > 1:
        style.legend_below(figure, panels[0])
    return figure, (
        "Attention time per iteration (forward and backward, projections included), peak training memory, "
        f"and KV cache.{savings(shown[0].iloc[0], shown[0].iloc[-1])}"
    )


def module_of(v: Variant) -> str:
    """The module of a variant's attention: MHA, GQA and MQA share one."""
    return str(v.runs[0].config.get("attn", {}).get("_target_", "")).rpartition(".")[0]


def savings(few: pd.Series, many: pd.Series) -> str:
    """A sentence on the training memory and KV cache that fewer KV heads save."""
    costs = [(row.peak_train_bytes, row.kv_cache_bytes_per_token) for row in (few, many)]
    if not all(cost and math.isfinite(cost) for pair in costs for cost in pair):
        return ""
    memory, cache = (1 - a / b for a, b in zip(*costs, strict=True))
    sentence = (
        f" From {many.heads} KV heads to {few.heads}, peak training memory "
        f"{'falls' if memory >= 0 else 'rises'} by {abs(memory):.0%} and the cache falls by {cache:.0%}."
    )
    if few.variant.first("kernel") == many.variant.first("kernel") == "matmul":
        sentence += " The matmul kernel stores attention weights for every query head, whatever the number of KV heads."
    return sentence


def grid_figure(study: Study, styles: Styles) -> Drawing | None:
    """Quality of attention x positions as a heat map."""
    cells = pd.Series(
        {
            (v.factors["attn"], v.factors["pos"]): study.quality[v]
            for v in study.compared
            if v in study.quality and set(v.factors) - {"optim.lr"} == {"attn", "pos"}
        }
    )
    if study.metric is None or cells.empty:
        return None
    values = cells.unstack(sort=False)
    if min(values.shape) < 2:
        return None
    figure, axes = style.canvas(1, height=1.4 + 0.5 * len(values))
    image = axes.imshow(values, cmap="cividis_r", aspect="auto")
    middle = (cells.min() + cells.max()) / 2
    for (row, column), value in np.ndenumerate(values):
        if not math.isnan(value):
            colour = "#ffffff" if value > middle else "#111111"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(values.columns)), values.columns)
    axes.set_yticks(range(len(values)), values.index)
    axes.set(xlabel="positions", ylabel="attention")
    axes.grid(visible=False)
    figure.colorbar(image, label=study.metric.name)
    return figure, (
        f"{study.metric.name.capitalize()} of attention x positions, mean over seeds; lower is better."
    )


def rates_figure(study: Study, styles: Styles) -> Drawing | None:
    """Quality against learning rate, one line per variant."""
    lines: dict[str, dict[float, Variant]] = {}
    for v in study.quality.index:
        if (rate := v.factors.get("optim.lr")) is not None:
            lines.setdefault(v.without("optim.lr").label, {})[rate] = v
    if study.metric is None or max(map(len, lines.values()), default=0) < 2:
        return None
    figure, axes = style.canvas(1, height=3.8)
    for i, (label, by_rate) in enumerate(lines.items()):
        rates = sorted(by_rate)
        axes.plot(rates, [study.quality[by_rate[rate]] for rate in rates], label=label,
                  marker=style.MARKERS[i % len(style.MARKERS)], color=styles[by_rate[rates[0]]].colour)  # fmt: skip
    axes.set_xscale("log")
    ticks = sorted({rate for by_rate in lines.values() for rate in by_rate})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel=study.metric.name)
    style.legend(axes, len(lines))
    return figure, f"{study.metric.name.capitalize()} by learning rate."


def numbers_figure(study: Study, styles: Styles) -> Drawing | None:
    """Quality against a key whose levels are numbers, as a rank or a window; one line per others."""
    shown = [v for v in study.compared if v in study.quality]
    levels = {key: {v.factors[key] for v in shown if is_number(v.factors.get(key))}
              for key in dict.fromkeys(key for v in shown for key in v.factors if key != "optim.lr")}  # fmt: skip
    key = max(levels, key=lambda key: len(levels[key]), default="")
    if study.metric is None or len(levels.get(key, ())) < FEW_NUMBERS:
        return None
    lines: dict[str, dict[float, Variant]] = {}
    for v in shown:
        if is_number(v.factors.get(key)):
            lines.setdefault(v.without(key).label, {})[v.factors[key]] = v
    figure, axes = style.canvas(1, height=3.8)
    for i, (label, variants) in enumerate(lines.items()):
        numbers = sorted(variants)
        colour = styles[variants[numbers[0]]].colour
        axes.plot(numbers, [study.quality[variants[n]] for n in numbers], color=colour,
                  marker=style.MARKERS[i % len(style.MARKERS)], label=label)  # fmt: skip
        for n in numbers:
            seeds = np.exp(study.scores[variants[n]])
            axes.vlines(n, seeds.min(), seeds.max(), color=colour, alpha=0.5)
    if min(levels[key]) > 0 and max(levels[key]) >= 8 * min(levels[key]):
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(levels[key]), [f"{n:g}" for n in sorted(levels[key])])
    axes.minorticks_off()
    axes.set(xlabel=key, ylabel=study.metric.name)
    style.legend(axes, len(lines))
    name = study.metric.name.capitalize()
    return figure, f"{name} by {key}: means over seeds, bars their range."


FEW_NUMBERS = 3  # levels that are worth a line


def is_number(level: object) -> bool:
    return isinstance(level, int | float) and not isinstance(level, bool)


def decoding_figure(study: Study, styles: Styles) -> Drawing | None:
    """Attention's multiply-adds for one more token, with and without a KV cache, and its size."""
    counted: dict[tuple[DecodingCost, ...], Variant] = {}  # positions change none of it
    for v in study.compared:
        with contextlib.suppress(ValueError, KeyError):  # code that has gone since, or no config
            counted.setdefault(tuple(decoding_costs(v.runs[0].config)), v)
    if len({counts[-1].cache_elements for counts in counted}) < 2:
        return None
    figure, (left, right) = style.canvas(2, height=3.8)
    for counts, v in counted.items():
        look = {"color": styles[v].colour, "linestyle": styles[v].line}
        table = pd.DataFrame(counts).set_index("length")
        label = v.without(*(key for key in v.factors if key.startswith("pos"))).label
        left.plot(table.multiply_adds, label=label, **look)
        left.plot(table.multiply_adds_uncached, alpha=0.35, linewidth=3, **look)
        right.plot(table.cache_elements, **look)
    left.set(xlabel="tokens before", ylabel="attention, multiply-adds a token", yscale="log")
    right.set(xlabel="tokens before", ylabel="KV cache, numbers stored")
    style.legend_below(figure, left)
    return figure, (
        "Decoding one token after n others: multiply-adds of all attention layers with the KV cache (thin) and "
        "without it (thick and pale), and the numbers that the cache stores. Counted, not measured. Without a "
        "cache, each step computes the keys and values of the whole text again."
    )


FIGURES: dict[str, Draw] = {
    "training": training_figure,
    "validation": validation_figure,
    "quality": quality_figure,
    "differences": differences_figure,
    "grid": grid_figure,
    "heads": heads_figure,
    "rates": rates_figure,
    "numbers": numbers_figure,
    "worth": worth_figure,
    "ladder": ladder_figure,
    "decoding": decoding_figure,
}
