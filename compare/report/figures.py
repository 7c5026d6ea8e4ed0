"""The figures of a report."""

import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from compare.report import evaluations as readouts
from compare.report.analysis import Study, score_of, scores_of
from compare.report.runs import Curve
from compare.report.statistics import LEVEL
from compare.report.style import (
    GREY,
    INK,
    LINES,
    MARKERS,
    SETTINGS,
    Figure,
    Style,
    canvas,
    legend,
    styles_of,
    svg,
)
from compare.report.variants import Variant, plain
from train.config.options import Reporting


def figures(found: Study) -> list[Figure]:
    """Every figure that the runs can fill."""
    import matplotlib

    styles = styles_of(found)
    with matplotlib.rc_context(SETTINGS):
        drawn = [figure for name, draw in FIGURES.items() if (figure := draw(name, found, styles))]
        others = (readouts.figure(k, found, styles) for k in readouts.kinds() if k not in FIGURES)
        return drawn + list(filter(None, others))


def with_lead(drawn: Sequence[Figure], report: Reporting) -> list[Figure]:
    """The figures with the one that a report leads with first, under the name that it gives it."""
    first = [figure for figure in drawn if figure.name == report.figure]
    others = [figure for figure in drawn if figure.name != report.figure]
    if report.figure_file:
        caption = f"{report.title}. " if report.title else ""
        first = [Figure(report.figure_file, caption + f.caption, f.svg) for f in first]
    return first + others


def training(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Training loss against iterations, the stages of a run as one curve."""
    return curves(name, found, styles, "train", "training loss, nats a token")


def validation(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Validation loss against iterations."""
    return curves(name, found, styles, "val", "validation loss, nats a token")


def curves(
    name: str, found: Study, styles: dict[int, Style], split: str, what: str
) -> Figure | None:
    shown = [
        (v, [h for run in v.done or v.runs if len(h := run.history(split)) > 1])
        for v in found.compared
    ]
    shown = [(v, histories) for v, histories in shown if histories]
    if not shown:
        return None
    switches = stage_ends(found)
    figure, axes = canvas(1, height=4.2)
    for v, histories in shown:
        reduced = [dict(smooth(h, switches)) if split == "train" else dict(h) for h in histories]
        steps = sorted({step for h in reduced for step in h})
        losses = [[h[step] for h in reduced if step in h] for step in steps]
        style = styles[id(v)]
        middle = [statistics.fmean(values) for values in losses]
        marker = style.marker if split == "val" else ""
        axes.plot(steps, middle, color=style.colour, linestyle=style.line, marker=marker, markersize=4,
                  label=v.label, linewidth=1.4)  # fmt: skip
        if len(reduced) > 1:
            low, high = [min(x) for x in losses], [max(x) for x in losses]
            axes.fill_between(steps, low, high, color=style.colour, alpha=0.15, linewidth=0)
    given = (run.stages[0].origin_loss for v, _ in shown for run in v.runs)
    origins = {loss for loss in given if loss is not None}
    for loss in origins if split == "val" else ():
        axes.axhline(loss, color=INK, linewidth=0.8, linestyle=":")
    for step in switches:
        axes.axvline(step, color=INK, linewidth=0.8, alpha=0.5)
    late = 0.02 if split == "train" else -1.0  # the first steps would flatten all that follows
    every = [
        x for _, histories in shown for h in histories for step, x in h if step > h[-1][0] * late
    ]
    bottom, top = min(every), quantile(every, 0.98) if split == "train" else max(every)
    if split == "val":
        bottom, top = min([bottom, *origins]), max([top, *origins])
    axes.set_ylim(bottom - 0.02 * abs(bottom), top + 0.02 * abs(top))
    axes.set(xlabel="iterations", ylabel=what)
    legend(axes, len(shown))
    band = " Bands span the seeds." if any(len(h) > 1 for _, h in shown) else ""
    between = " The vertical line is where the next stage starts." if switches else ""
    before = (
        " The dotted line is the run that gave the weights." if origins and split == "val" else ""
    )
    means = " Each point is the mean of its steps." if split == "train" else ""
    return Figure(name, f"{what.capitalize()}.{means}{band}{between}{before}", svg(figure, name))


def stage_ends(found: Study) -> list[int]:
    """The iterations at which runs went over to their next stage."""
    ends = set()
    for v in found.compared:
        for run in v.runs:
            done = 0
            for stage in run.stages[:-1]:
                done += stage.summary.get("steps", 0)
                ends.add(done)
    return sorted(ends - {0})


def smooth(curve: Curve, switches: Sequence[int], points: int = 100) -> Curve:
    """Means over equal stretches of steps; no stretch reaches over the end of a stage."""
    if len(curve) < 2:
        return curve
    edges = [curve[0][0] - 1, *switches, curve[-1][0]]
    width = max(1, (edges[-1] - edges[0]) // points)
    cells: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for step, loss in curve:
        stage = sum(step > edge for edge in edges[1:-1])
        cells.setdefault((stage, (step - edges[stage] - 1) // width), []).append((step, loss))
    return [
        (round(statistics.fmean(s for s, _ in c)), statistics.fmean(x for _, x in c))
        for c in cells.values()
    ]


def quality(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Quality against training time, memory and KV cache: what each point costs and buys."""
    ruler = found.ruler
    if ruler is None:
        return None
    axes_of = [
        *([("train_seconds", 1.0, "training time, s")] if found.times_compare else []),
        ("peak_train_bytes", 2**-20, "peak training memory, MiB"),
        ("kv_cache_bytes_per_token", 1.0, "KV cache, bytes a token"),
    ]
    scores = {id(v): score_of(v, ruler) for v in found.compared}
    points = {
        key: [(v, scale * x, math.exp(y)) for v in found.compared
              if (x := v.median(key)) is not None and (y := scores[id(v)]) is not None]
        for key, scale, _ in axes_of
    }  # fmt: skip
    if all(len(p) < 2 for p in points.values()):
        return None
    figure, panels = canvas(len(axes_of), height=3.6)
    for axes, (key, _, what) in zip(panels, axes_of, strict=True):
        for v, x, y in points[key]:
            spread = [math.exp(s) for s in scores_of(v, ruler)]
            axes.vlines(x, min(spread), max(spread), color=styles[id(v)].colour, alpha=0.5)
            axes.plot([x], [y], styles[id(v)].marker, color=styles[id(v)].colour, label=v.label)
        front = pareto([(x, y) for _, x, y in points[key]])
        axes.plot(
            *zip(*front or [(math.nan, math.nan)], strict=True),
            color=INK,
            linewidth=0.8,
            alpha=0.5,
            drawstyle="steps-post",
        )
        axes.set(xlabel=what)
    panels[0].set(ylabel=ruler.name)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    caption = (
        f"{ruler.name.capitalize()} against what it costs; lower and further left is better. The grey steps are "
        "the Pareto front: no other variant is better in both. Points are means over seeds in quality and medians in cost, bars their range."
    )
    return Figure(name, caption, svg(figure, name))


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in both coordinates, from left to right."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def differences(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Every variant's difference to the baseline, with its interval."""
    shown = [(found.variants[i], d) for i, d in found.rows.items()]
    if not shown or found.ruler is None or all(d.low is None for _, d in shown):
        return None
    figure, axes = canvas(1, height=1.2 + 0.32 * len(shown))
    for place, (v, d) in enumerate(reversed(shown)):
        style = styles[id(v)]
        if d.low is not None and d.high is not None:
            axes.hlines(
                place,
                100 * math.expm1(d.low),
                100 * math.expm1(d.high),
                color=style.colour,
                linewidth=2,
            )
        fill = style.colour if d.real else "none"
        axes.plot(
            [100 * math.expm1(d.mean)], [place], "o", color=style.colour, markerfacecolor=fill
        )
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(shown)), [v.label for v, _ in reversed(shown)])
    axes.set(xlabel=f"{found.ruler.name} against {found.baseline.label}, %")
    caption = (
        f"Difference to {found.baseline.label}, paired by seed, with {LEVEL:.0%} intervals; left of zero is "
        "better. A filled point is a difference that holds for all comparisons together."
    )
    return Figure(name, caption, svg(figure, name))


def heads(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Attention time, memory and cache by KV heads."""
    lines: dict[tuple[str, ...], list[Variant]] = {}
    for v in found.compared:
        if isinstance(v.first("n_kv_heads"), int) and v.median("attention_ms") is not None:
            mechanism = str(v.runs[0].config.get("attn", {}).get("_target_", "")).rpartition(".")[0]
            rest = map(plain, without_heads(v).values())
            lines.setdefault((mechanism, *rest), []).append(v)
    lines = {k: sorted(vs, key=lambda v: v.first("n_kv_heads")) for k, vs in lines.items()}
    lines = {k: vs for k, vs in lines.items() if len({v.first("n_kv_heads") for v in vs}) > 1}
    if not lines:
        return None
    figure, panels = canvas(3, height=3.6)
    wanted = (("attention_ms", 1.0, "attention, ms an iteration"),
              ("peak_train_bytes", 2**-20, "peak training memory, MiB"),
              ("kv_cache_bytes_per_token", 1.0, "KV cache, bytes a token"))  # fmt: skip
    for axes, (key, scale, what) in zip(panels, wanted, strict=True):
        for i, variants in enumerate(lines.values()):
            there = [
                (v.first("n_kv_heads"), y) for v in variants if (y := v.median(key)) is not None
            ]
            label = Variant(without_heads(variants[0])).label
            hues = {styles[id(v)].colour for v in variants}
            axes.plot([x for x, _ in there], [scale * y for _, y in there], label=label,
                      marker=MARKERS[i % len(MARKERS)], linestyle=LINES[i % len(LINES)], color=hues.pop() if len(hues) == 1 else GREY)  # fmt: skip
        axes.set_xticks(sorted({v.first("n_kv_heads") for vs in lines.values() for v in vs}))
        axes.set(xlabel="KV heads", ylabel=what)
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
    if len(lines) > 1:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    caption = (
        "Attention time an iteration (forward and backward, projections included), the peak of training memory, "
        f"and the KV cache. {what_memory_hides(lines)}"
    )
    return Figure(name, caption, svg(figure, name))


def what_memory_hides(lines: dict[tuple[str, ...], list[Variant]]) -> str:
    """What the fewest KV heads save of training memory and of the cache, in the first line."""
    few, *_, many = next(iter(lines.values()))
    memory, cache = (
        None if not (a := few.median(key)) or not (b := many.median(key)) else 1 - a / b
        for key in ("peak_train_bytes", "kv_cache_bytes_per_token")
    )
    if memory is None or cache is None:
        return ""
    change = f"{'falls' if memory >= 0 else 'rises'} by {abs(memory):.0%}"
    said = (
        f"From {many.first('n_kv_heads')} KV heads to {few.first('n_kv_heads')}, the peak of training memory "
        f"{change} and the cache by {cache:.0%}."
    )
    if few.first("kernel") == many.first("kernel") == "matmul":
        said += " The matmul kernel keeps attention weights for every query head, whatever the KV heads."
    return said


def without_heads(v: Variant) -> dict[str, Any]:
    """What tells a variant from others beside its KV heads."""
    return {k: w for k, w in v.factors.items() if k not in ("attn", "attn.n_kv_heads")}


def grid(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Quality of attention x positions as a heat map."""
    ruler = found.ruler
    cells: dict[tuple[str, str], float] = {}
    for v in found.compared:
        score = score_of(v, ruler) if ruler else None
        if score is not None and set(v.factors) - {"optim.lr"} == {"attn", "pos"}:
            cells[v.factors["attn"], v.factors["pos"]] = math.exp(score)
    attns, poss = (list(dict.fromkeys(key[i] for key in cells)) for i in (0, 1))
    if ruler is None or len(attns) < 2 or len(poss) < 2:
        return None
    figure, axes = canvas(1, height=1.4 + 0.5 * len(attns))
    values = [[cells.get((a, p), math.nan) for p in poss] for a in attns]
    image = axes.imshow(values, cmap="cividis_r", aspect="auto")
    middle = (min(cells.values()) + max(cells.values())) / 2
    for (a, p), value in cells.items():
        axes.text(poss.index(p), attns.index(a), f"{value:.2f}", ha="center", va="center",
                  color="#ffffff" if value > middle else "#111111")  # fmt: skip
    axes.set_xticks(range(len(poss)), poss)
    axes.set_yticks(range(len(attns)), attns)
    axes.set(xlabel="positions", ylabel="attention")
    axes.grid(visible=False)
    figure.colorbar(image, label=ruler.name)
    caption = (
        f"{ruler.name.capitalize()} of attention x positions, mean over seeds; lower is better."
    )
    return Figure(name, caption, svg(figure, name))


def rates(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Quality against learning rate, one line a variant."""
    ruler = found.ruler
    lines: dict[str, list[tuple[float, float, Variant]]] = {}
    for v in found.variants:
        rate, score = v.factors.get("optim.lr"), score_of(v, ruler) if ruler else None
        if rate is not None and score is not None:
            rest = Variant({k: w for k, w in v.factors.items() if k != "optim.lr"}).label
            lines.setdefault(rest, []).append((rate, math.exp(score), v))
    if ruler is None or not lines or max(map(len, lines.values())) < 2:
        return None
    figure, axes = canvas(1, height=3.8)
    for i, (rest, points) in enumerate(lines.items()):
        x, y, tried = zip(*sorted(points, key=lambda p: p[0]), strict=True)
        axes.plot(
            x, y, marker=MARKERS[i % len(MARKERS)], color=styles[id(tried[0])].colour, label=rest
        )
    axes.set_xscale("log")
    ticks = sorted({x for points in lines.values() for x, *_ in points})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel="learning rate", ylabel=ruler.name)
    legend(axes, len(lines))
    return Figure(name, f"{ruler.name.capitalize()} by learning rate.", svg(figure, name))


def decoding(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """What one more token costs after n: multiply-adds of attention with and without a cache, and its size."""
    from compare.cost.counts import DecodingCost, decoding_costs

    counted: dict[tuple[DecodingCost, ...], Variant] = {}  # positions change none of it
    for v in found.compared:
        with contextlib.suppress(ValueError, KeyError):  # code that has gone since, or no config
            counted.setdefault(tuple(decoding_costs(v.runs[0].config)), v)
    if len({counts[-1].cache_elements for counts in counted}) < 2:
        return None
    figure, panels = canvas(2, height=3.8)
    for counts, v in counted.items():
        style = styles[id(v)]
        lengths = [c.length for c in counts]
        label = Variant({k: w for k, w in v.factors.items() if not k.startswith("pos")}).label
        panels[0].plot(lengths, [c.multiply_adds for c in counts], color=style.colour, linestyle=style.line,
                       label=label)  # fmt: skip
        panels[0].plot(lengths, [c.multiply_adds_uncached for c in counts], color=style.colour, alpha=0.35,
                       linestyle=style.line, linewidth=3)  # fmt: skip
        panels[1].plot(
            lengths, [c.cache_elements for c in counts], color=style.colour, linestyle=style.line
        )
    panels[0].set(xlabel="tokens before", ylabel="attention, multiply-adds a token", yscale="log")
    panels[1].set(xlabel="tokens before", ylabel="KV cache, numbers kept")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    caption = (
        "One more token after n: multiply-adds of all attention layers with the cache (thin) and without it "
        "(thick and pale), and the numbers that the cache keeps. Counted, not measured. Generation here uses the "
        "cache; without it every step makes the keys and values of the whole text again."
    )
    return Figure(name, caption, svg(figure, name))


FIGURES: dict[str, Callable[[str, Study, dict[int, Style]], Figure | None]] = {
    "training": training,
    "validation": validation,
    "quality": quality,
    "differences": differences,
    "grid": grid,
    "heads": heads,
    "rates": rates,
    "decoding": decoding,
    **readouts.FIGURES,
}


def quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]
