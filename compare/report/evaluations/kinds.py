"""Tables and figures of evaluations, for eval.py and for the report of a sweep."""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.colors import PowerNorm

from compare.report import style
from compare.report.analysis import Study
from compare.report.evaluations import exact_match, finetuning
from compare.report.style import Draw, Drawing, Styles
from compare.report.tables import Rows, exp_with_interval, table_of
from compare.report.variants import Variant
from compare.statistics.paired import mean_interval, with_interval
from train.config.compose import choices_of
from train.config.schema import Config


@dataclass(frozen=True)
class Evaluation:
    """A kind of evaluation in a report; without answers, its table has no rows."""

    heading: str
    table: Callable[[Study], Rows]
    draw: Draw


def evaluation(kind: str, study: Study) -> Evaluation:
    """A kind of evaluation: one of those below, or one that the answers of these runs define."""
    if kind in KNOWN:
        return KNOWN[kind]
    title = next((a.get("title") for a in generic_answers(kind, study)), None) or kind
    return Evaluation(title, partial(generic_table, kind), partial(generic_figure, kind, title))


def kinds() -> list[str]:
    """All kinds of evaluation: those below, then the others in configs/eval."""
    names = (choice.rpartition("/")[2] for choice in choices_of("eval"))
    return list(dict.fromkeys((*KNOWN, *names)))


def length_losses(study: Study) -> pd.DataFrame:
    """Losses of runs by position scheme and context, and the label of the curve they belong to."""
    rows = pd.DataFrame(
        {"variant": v, **row, "label": f"{v.label} as {row['pos']}" if row["factor"] else v.label}
        for v in study.variants
        for answer in v.answers("length")
        for row in answer["rows"]
    )
    return rows.astype({"loss": float}) if len(rows) else rows


def length_table(study: Study) -> Rows:
    """Perplexity by context: a row for each variant, and for each way to scale its positions."""
    losses = length_losses(study)
    if losses.empty:
        return []
    cells = (
        losses.groupby(["label", "context"], sort=False)
        .loss.agg(perplexity_cell)
        .unstack()
        .sort_index(axis=1)
    )
    cells = cells.reindex(losses.label.unique()).fillna("")
    header = ["perplexity at context", *(f"{context:,}" for context in cells)]
    return [header, *map(list, cells.itertuples())]


def perplexity_cell(losses: pd.Series) -> str:
    """'35.3 (33.8 to 36.9)': over seeds; 'not defined' beyond the limit of a position scheme."""
    return exp_with_interval(losses.dropna().tolist(), 1) if losses.notna().any() else "not defined"


def length_figure(study: Study, styles: Styles) -> Drawing | None:
    """Perplexity against the context, and loss against the position in the longest one."""
    losses = length_losses(study)
    if losses.empty:
        return None
    figure, (left, right) = style.canvas(2, height=4.4)
    unscaled: dict[Variant, pd.Series] = {}
    for label, rows in losses.groupby("label", sort=False):
        v, pos = rows.iloc[0][["variant", "pos"]]
        points = np.exp(rows.groupby("context").loss.mean().dropna())
        look = styles[v].plot
        if v in unscaled:  # another scheme, from the last context before
            before = unscaled[v]
            points = pd.concat([before[before.index < points.index.min()].tail(1), points])
            look |= {"linestyle": ":", "marker": SCALED.get(pos, ".")}
        else:
            unscaled[v] = points
        left.plot(points, label=label, linewidth=1.4, **look)
        right.plot(by_position(v, pos), linewidth=1.4, **look)
    trained = {a["trained_context"] for v in unscaled for a in v.answers("length")}
    for context in trained:
        for axes in (left, right):
            axes.axvline(context, color=style.INK, linewidth=0.8, alpha=0.5)
    left.set_yscale("log")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis("{x:g}")
    ticks_at(left, losses.context)
    ticks_at(right, (4**power for power in range(8)))
    left.set(xlabel="context at evaluation, tokens", ylabel="perplexity")
    right.set(xlabel="tokens before, in the longest context", ylabel="loss, nats a token")
    style.legend_below(figure, left)
    return figure, (
        "Left: perplexity of the whole text, in windows without overlap. Right: loss by the number of tokens "
        "before, in the longest context for which a scheme is defined. The vertical line is the training context; "
        "a scheme is not defined beyond the end of its curve. Dotted: RoPE scaled only at evaluation, by the "
        "factor that the context needs."
    )


SCALED = {"rope_linear": "x", "rope_ntk": "+", "rope_yarn": "*"}  # markers


def ticks_at(axes: Any, values: Iterable[int]) -> None:
    """A scale by powers of two, with ticks at those values that lie within the drawn ones."""
    low, high = axes.get_xlim()
    axes.set_xscale("log", base=2)
    shown = sorted({value for value in values if low <= value <= high})
    axes.set_xticks(shown, [f"{value:,}" for value in shown])


def by_position(v: Variant, pos: str) -> pd.Series:
    """Mean loss over seeds, by the middle of each bucket of positions."""
    answers = v.answers("length")
    buckets = [bucket for a in answers for bucket in a["positions"].get(pos, [])]
    losses = pd.DataFrame(buckets, columns=["start", "end", "loss"], dtype=float)
    return losses.loss.groupby(np.sqrt(losses.start.clip(1) * losses.end)).mean()


#: Columns of the decoding table: headers, keys and formats.
DECODE = {
    "batch": ("batch_size", ",.0f"),
    "context": ("context", ",.0f"),
    "first token ms": ("first_token_ms", ",.1f"),
    "prefill tokens/s": ("prefill_tokens_per_second", ",.0f"),
    "step ms": ("step_ms", ",.2f"),
    "IQR": ("step_ms_iqr", ",.2f"),
    "tokens/s": ("tokens_per_second", ",.0f"),
    "step ms, no cache": ("uncached_step_ms", ",.1f"),
    "speed-up": ("times_as_fast_as_uncached", ",.1f"),
    "cache MiB": ("cache_mib", ",.2f"),
    "launching": ("launch_share", ".0%"),
}
LAUNCH_BOUND = 0.9  # of a step is launching it: the device waits for Python
BOUND = (
    "The device waits for Python to launch its work, in some of them nearly all of a step: those times "
    "say how many kernels a variant has, not what its cache costs. Larger batches or contexts would say that."
)


def decode_rows(study: Study) -> pd.DataFrame:
    """The rows of each variant's first answer, by batch size and context."""
    rows = [
        {
            "variant": v,
            "launch_share": None,  # unknown on a CPU and in older answers
            **row,
            "cache_mib": row["cache_bytes"] / 2**20,
        }
        for v in study.variants
        for answer in v.answers("decode")[:1]
        for row in answer["rows"]
    ]
    rows.sort(key=lambda row: (row["batch_size"], row["context"]))
    return pd.DataFrame(rows).astype({"launch_share": float} if rows else {})


def decode_table(study: Study) -> Rows:
    """A row for each batch size, context and variant; on a GPU, with what of a step is launching it."""
    rows = decode_rows(study)
    known = not rows.empty and rows.launch_share.notna().any()
    columns = {name: column for name, column in DECODE.items() if known or name != "launching"}
    cells = [
        [
            row.variant.label,
            *(
                "-" if pd.isna(row[key]) else f"{row[key]:{digits}}"
                for key, digits in columns.values()
            ),
        ]
        for _, row in rows.iterrows()
    ]
    return [["variant", *columns], *cells]


def decode_figure(study: Study, styles: Styles) -> Drawing | None:
    """Tokens per second and size of the cache against the context, for the largest batch."""
    rows = decode_rows(study)
    if rows.empty:
        return None
    batch = rows.batch_size.max()
    figure, (left, right) = style.canvas(2, height=4.2)
    for v, measured in (
        rows[rows.batch_size == batch].set_index("context").groupby("variant", sort=False)
    ):
        look = styles[v].plot
        left.plot(measured.tokens_per_second, label=v.label, **look)
        uncached = 1e3 * batch / measured.uncached_step_ms
        left.plot(uncached, **look | {"alpha": 0.35, "linewidth": 3, "marker": ""})
        right.plot(measured.cache_mib, **look)
    for axes in (left, right):
        ticks_at(axes, rows.context)
        axes.set_yscale("log")
    left.set(xlabel="tokens in the cache", ylabel="tokens a second")
    right.set(xlabel="tokens in the cache", ylabel="KV cache, MiB")
    style.legend_below(figure, left)
    bound = rows.launch_share.max() >= LAUNCH_BOUND
    return figure, (
        f"Decoding {batch} text{'s' if batch > 1 else ''} at once: tokens per second with the KV cache (thin) and when "
        "the whole text is processed again for each token (thick and pale), and the size of the cache. "
        "Medians; the variants were measured interleaved." + (f" {BOUND}" if bound else "")
    )


#: Statistics of a head, and the labels of their panels.
HEAD = {
    "distance": "mean distance, tokens",
    "entropy": "entropy, nats",
    "first": "weight on the first token",
    "induction": "induction weight",
}


def attention_table(study: Study) -> Rows:
    """Means over heads and runs, the strongest induction head, and losses on repeated tokens."""
    answers = {v: found for v in study.variants if (found := v.answers("attention"))}
    heads = {v: [heads_of(answer) for answer in found] for v, found in answers.items()}
    means = {v: pd.concat(runs).mean(numeric_only=True) for v, runs in heads.items()}
    losses = {v: pd.DataFrame(a["repeated_tokens"] for a in answers[v]).mean() for v in answers}
    return table_of(
        {
            "variant": v.label,
            "distance, tokens": f"{means[v].distance:.1f}",
            "entropy, nats": f"{means[v].entropy:.2f}",
            "weight on first token": f"{means[v]['first']:.3f}",
            "strongest induction head": f"{statistics.fmean(x.induction.max() for x in heads[v]):.3f}",
            "loss, random tokens": f"{losses[v]['first']:.3f}",
            "loss, repeated": f"{losses[v].again:.3f}",
        }
        for v in answers
    )


def heads_of(answer: Config) -> pd.DataFrame:
    """Statistics of all heads, a row per head, with its layer from 1."""
    layers = [pd.DataFrame(layer).assign(layer=i) for i, layer in enumerate(answer["layers"], 1)]
    return pd.concat(layers)


def attention_figure(study: Study, styles: Styles) -> Drawing | None:
    """Each head as a dot, by layer and statistic."""
    shown = {v: answers[0] for v in study.variants if (answers := v.answers("attention"))}
    if not shown:
        return None
    figure, panels = style.canvas(4, height=5.6, rows=2)
    for axes, (statistic, label) in zip(panels, HEAD.items(), strict=True):
        head_dots(axes, shown, styles, statistic, label)
    style.legend_below(figure, panels[0])
    return figure, (
        "Attention weights, one dot per head, in the first run of each variant: mean distance in tokens, entropy, "
        "and weight on the first token, for the later half of the queries in real text; and, on random tokens "
        "that are repeated, the weight on the token that followed the same token before (induction). Dotted: "
        "attention uniform over all keys."
    )


def head_dots(
    axes: Any, shown: dict[Variant, Config], styles: Styles, statistic: str, label: str
) -> None:
    """A statistic of each head as a dot, by layer, the variants side by side; dotted, of uniform attention."""
    for i, (v, answer) in enumerate(shown.items()):
        heads = heads_of(answer)
        aside = heads.layer + 0.6 * ((i + 0.5) / len(shown) - 0.5)
        dots = styles[v].plot | {"linestyle": "", "alpha": 0.75}
        axes.plot(aside, heads[statistic], label=v.label, **dots)
    for level in {answer["even"][statistic] for answer in shown.values()}:
        axes.axhline(level, color=style.INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(1, 1 + max(len(answer["layers"]) for answer in shown.values())))
    axes.set(xlabel="layer", ylabel=label)


def distance_answers(study: Study) -> dict[Variant, list[Config]]:
    """The answers with weights by distance, which earlier versions did not write."""
    found = {v: [a for a in v.answers("attention") if "distances" in a] for v in study.variants}
    return {v: answers for v, answers in found.items() if answers}


KEYS = "keys for 90 %"


def distance_means(answer: Config) -> pd.Series:
    """Weight by distance, then the share of keys that hold 90 % of it: means over heads."""
    heads = heads_of(answer)
    means = [*np.stack(heads.mass.tolist()).mean(axis=0), heads.keys_held.mean()]
    return pd.Series(means, [*answer["distances"], KEYS])


def uniform_means(answer: Config) -> pd.Series:
    """The same of uniform attention."""
    even = answer["even"]
    return pd.Series([*even["mass"], even["keys_held"]], [*answer["distances"], KEYS])


def distance_table(study: Study) -> Rows:
    """Attention weight by distance in tokens, means over heads and runs, beside uniform attention's."""
    rows: dict[str, pd.Series] = {}
    uniform: dict[str, pd.Series] = {}
    for v, answers in distance_answers(study).items():
        rows[v.label] = pd.concat(map(distance_means, answers), axis=1).mean(axis=1)
        uniform |= {f"uniform over {a['context']:,} tokens": uniform_means(a) for a in answers}
    rows |= uniform
    names = {name for row in rows.values() for name in row.index} - {KEYS}
    columns = [*sorted(names, key=lambda name: [*map(int, name.split("-"))]), KEYS]
    cells = (
        [label, *("" if np.isnan(x) else f"{x:.3f}" for x in row.reindex(columns))]
        for label, row in rows.items()
    )
    return [["attention weight at distance", *columns], *cells]


def distance_figure(study: Study, styles: Styles) -> Drawing | None:
    """Attention weight against distance, and the share of keys that hold 90 % of it, by head."""
    found = distance_answers(study)
    if not found:
        return None
    figure, (left, right) = style.canvas(2, height=4.0)
    for v, answers in found.items():
        mass = pd.concat(map(distance_means, answers), axis=1).mean(axis=1).drop(KEYS)
        left.plot(mass, label=v.label, linewidth=1.4, **styles[v].plot)
    for answer in {a["context"]: a for answers in found.values() for a in answers}.values():
        left.plot(uniform_means(answer).drop(KEYS), color=style.INK, linewidth=0.8, linestyle=":")
    left.set(xlabel="distance, tokens", ylabel="attention weight", ylim=(0, None))
    left.tick_params(axis="x", labelrotation=45)
    shown = {v: answers[0] for v, answers in found.items()}
    head_dots(right, shown, styles, "keys_held", "share of keys that hold 90 % of the weight")
    right.set_ylim(0, 1)
    style.legend_below(figure, left)
    return figure, (
        "Left: attention weight by distance, mean over heads, runs and the later half of the queries in real "
        "text. Right: the smallest share of the visible keys that holds 90 % of a query's weight, one dot per "
        "head, in the first run of each variant. Dotted: attention uniform over all keys."
    )


def maps_figure(study: Study, styles: Styles) -> Drawing | None:
    """The mean attention matrix of each head of each variant's first run: layers down, heads across."""
    rows = [
        (f"{v.label}\nlayer {layer}", [np.array(head) for head in heads])
        for v in study.variants
        for answer in v.answers("attention")[:1]
        for layer, heads in enumerate(answer.get("maps", []), 1)
    ]
    if not rows:
        return None
    across = max(len(heads) for _, heads in rows)
    height = 0.3 + len(rows) * min(7.2 / across, 2.4)
    figure, panels = style.canvas(across * len(rows), height, rows=len(rows))
    grid = np.atleast_1d(panels).reshape(len(rows), across)
    # The first query has one key to attend to: its weight of 1 says nothing.
    largest = max(head[1:].max(initial=0) for _, heads in rows for head in heads)
    norm = PowerNorm(0.5, vmin=0, vmax=largest or 1)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[], frame_on=False)
    for panel, (label, heads) in zip(grid, rows, strict=True):
        panel[0].set_ylabel(label)
        for axes, head in zip(panel, heads, strict=False):
            past = np.where(np.tri(len(head)) > 0, head, np.nan)
            image = axes.imshow(past, cmap="cividis", norm=norm, interpolation="nearest")
    for number, axes in enumerate(grid[0], 1):
        axes.set_title(f"head {number}", fontsize="medium")
    figure.colorbar(image, ax=list(grid.flat), label="weight", fraction=0.03)
    return figure, (
        "Mean attention matrices: queries down, keys across, both from the first token of a window, in the first "
        "run of each variant. Long contexts are pooled: a cell is the mean over its queries of the weight on all "
        "of its keys. The colour is proportional to the square root of the weight."
    )


KNOWN = {
    "length": Evaluation("Length extrapolation", length_table, length_figure),
    "decode": Evaluation("Decoding speed", decode_table, decode_figure),
    "attention": Evaluation("Attention heads", attention_table, attention_figure),
    "attention_distance": Evaluation("Attention by distance", distance_table, distance_figure),
    "attention_maps": Evaluation("Attention maps", lambda study: [], maps_figure),
    "answers": Evaluation("Answers to questions", exact_match.table, exact_match.figure),
    "answers_differences": Evaluation(
        "Answers: what the choices change",
        exact_match.differences_table,
        exact_match.differences_figure,
    ),
    "finetuning": Evaluation("Finetuning", finetuning.table, finetuning.figure),
}


# Other kinds of evaluation: their answers hold rows, a title, and optionally the axes of a figure; see the
# docstring of compare/evaluate.


def generic_answers(kind: str, study: Study) -> list[Config]:
    """The answers that hold rows."""
    return [a for v in study.variants for a in v.answers(kind) if "rows" in a]


def generic_rows(kind: str, v: Variant) -> list[Config]:
    """The rows of a variant's answers; rows that differ only in floats are one, with lists of them."""
    rows: dict[str, Config] = {}
    for row in (row for answer in v.answers(kind) for row in answer.get("rows", [])):
        key = {name: x for name, x in row.items() if not isinstance(x, float | None)}
        merged = rows.setdefault(str(key), {name: key.get(name, []) for name in row})
        for name, x in row.items():
            if isinstance(x, float):
                merged[name].append(x)
    return list(rows.values())


def generic_table(kind: str, study: Study) -> Rows:
    """A line per variant and row, its floats as means over runs with their intervals."""
    lines = [(v.label, row) for v in study.variants for row in generic_rows(kind, v)]
    names = list(dict.fromkeys(name for _, row in lines for name in row))
    cells = ([label, *(generic_cell(row.get(name, "")) for name in names)] for label, row in lines)
    return [["variant", *names], *cells]


def generic_cell(value: Any) -> str:
    """'0.513 (0.497 to 0.529)' for a list of floats, one per run; other values as they are."""
    if not isinstance(value, list):
        return str(value)
    found = [x for x in value if math.isfinite(x)]
    return with_interval(*mean_interval(found), "{:.4g}".format) if found else "not defined"


def generic_figure(kind: str, title: str, study: Study, styles: Styles) -> Drawing | None:
    """A curve per variant, means over runs, if the answers name the columns of its axes."""
    answers = generic_answers(kind, study)
    if not answers or "figure" not in answers[0]:
        return None
    x, y = answers[0]["figure"]["x"], answers[0]["figure"]["y"]
    figure, axes = style.canvas(1, height=4.2)
    for v in study.variants:
        points = {row[x]: statistics.fmean(row[y]) for row in generic_rows(kind, v) if row[y]}
        axes.plot(list(points), list(points.values()), label=v.label, **styles[v].plot)
    axes.set(xlabel=x, ylabel=y)
    style.legend(axes, len(study.variants))
    return figure, f"{title}: {y} by {x}."
