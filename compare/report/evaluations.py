"""What was measured of finished runs, as tables and figures: for eval.py, and for a sweep's report."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from compare.report.analysis import Study
from compare.report.statistics import mean_interval
from compare.report.style import INK, Figure, Style, canvas, legend, svg
from compare.report.variants import Variant
from train.config.compose import choices_of
from train.config.schema import Config

Rows = list[list[str]]


def markdown(rows: Rows) -> str:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], f"|---{'|---:' * (len(rows[0]) - 1)}|", *lines[1:]]) + "\n"


def answers_of(v: Variant, kind: str) -> list[Config]:
    """What was measured of a variant's finished runs."""
    return [answer for run in v.done if (answer := run.answer(kind))]


def length_table(found: Study) -> Rows:
    """Perplexity by context: a row for each variant, and for each way to scale its positions."""
    lines = list(length_lines(found))
    contexts = sorted({context for _, _, losses in lines for context in losses})
    rows = [["perplexity at context", *(f"{c:,}" for c in contexts)]]
    for label, _, losses in lines:
        rows.append([label, *(perplexities(losses.get(c)) for c in contexts)])
    return rows


def perplexities(losses: Sequence[float | None] | None) -> str:
    """'35.3 (33.8 to 36.9)': over seeds; 'not defined' where the positions end before."""
    if not losses:
        return ""
    known = [loss for loss in losses if loss is not None]
    if not known:
        return "not defined"
    mean, low, high = mean_interval(known)
    within = (
        "" if low is None or high is None else f" ({math.exp(low):.1f} to {math.exp(high):.1f})"
    )
    return f"{math.exp(mean):.1f}{within}"


def length_lines(found: Study) -> Iterable[tuple[str, Variant, dict[int, list[float | None]]]]:
    """For each variant and scheme: a label, the variant, and the losses of its runs by context."""
    for v in found.variants:
        answers = answers_of(v, "length")
        rows = [row for answer in answers for row in answer["rows"]]
        for scheme in dict.fromkeys(row["pos"] for row in rows):
            losses: dict[int, list[float | None]] = {}
            for row in (row for row in rows if row["pos"] == scheme):
                losses.setdefault(row["context"], []).append(row["loss"])
            scaled = any(row["factor"] for row in rows if row["pos"] == scheme)
            yield f"{v.label} as {scheme}" if scaled else v.label, v, losses


def length_figure(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Perplexity against the context, and loss against the position in the longest one."""
    lines = list(length_lines(found))
    if not lines:
        return None
    figure, (left, right) = canvas(2, height=4.4)
    own: dict[int, dict[int, float]] = {}
    for label, v, losses in lines:
        known = {c: [x for x in seeds if x is not None] for c, seeds in sorted(losses.items())}
        points = {c: math.exp(statistics.fmean(x)) for c, x in known.items() if x}
        scheme = label.removeprefix(f"{v.label} as ") if id(v) in own else None
        before = {c: y for c, y in own.setdefault(id(v), points).items() if c < min(points)}
        points = dict(list(before.items())[-1:] if scheme else []) | points
        look = looks(styles[id(v)], scheme)
        left.plot(list(points), list(points.values()), label=label, **look)
        buckets = by_position(v, scheme)
        right.plot(list(buckets), list(buckets.values()), **look)
    for trained in {
        answer["trained_context"] for _, v, _ in lines for answer in answers_of(v, "length")
    }:
        for axes in (left, right):
            axes.axvline(trained, color=INK, linewidth=0.8, alpha=0.5)
    left.set_yscale("log")
    for axis in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis("{x:g}")
    ticks_at(left, {context for _, _, losses in lines for context in losses})
    ticks_at(right, {4**power for power in range(8)})
    left.set(xlabel="context at evaluation, tokens", ylabel="perplexity")
    right.set(xlabel="tokens before, in the longest context", ylabel="loss, nats a token")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    caption = (
        "Left: perplexity of the whole text, read in windows of a context without overlap. Right: loss by the "
        "number of tokens before, in the longest context that a scheme is defined for. The thin line is the "
        "context of training; a curve that ends is not defined beyond. Dotted: RoPE scaled at evaluation alone, "
        "by the factor that the context needs."
    )
    return Figure(name, caption, svg(figure, name))


def ticks_at(axes: Any, values: Iterable[int]) -> None:
    """A scale by powers of two, with these values named where they lie within the drawn ones."""
    low, high = axes.get_xlim()
    axes.set_xscale("log", base=2)
    shown = sorted(value for value in values if low <= value <= high)
    axes.set_xticks(shown, [f"{value:,}" for value in shown])


def looks(style: Style, scheme: str | None) -> dict[str, Any]:
    """How a line is drawn; with a scheme, one that was put in place of the variant's own."""
    marks = dict(zip(("rope_linear", "rope_ntk", "rope_yarn"), "x+*", strict=True))
    shape = (
        {"linestyle": ":", "marker": marks.get(scheme, ".")}
        if scheme
        else {"linestyle": style.line, "marker": style.marker}
    )
    return {"color": style.colour, "linewidth": 1.4, "markersize": 4, **shape}


def by_position(v: Variant, scheme: str | None) -> dict[float, float]:
    """Mean loss over seeds, by the middle of each bucket of positions."""
    buckets: dict[float, list[float]] = {}
    for answer in answers_of(v, "length"):
        positions = answer["positions"]
        for bucket in positions.get(scheme or next(iter(positions), ""), []):
            middle = math.sqrt(max(bucket["start"], 1) * bucket["end"])
            buckets.setdefault(middle, []).append(bucket["loss"])
    return {middle: statistics.fmean(losses) for middle, losses in buckets.items()}


def decode_table(found: Study) -> Rows:
    """A row for each batch size, context and variant."""
    rows = [
        ["variant", "batch", "context", "first token ms", "prefill tokens/s", "step ms", "IQR",
         "tokens/s", "no cache: step ms", "times as fast", "cache MiB"]
    ]  # fmt: skip
    cells = [(row, v.label) for v in found.variants for row in decode_rows(v)]
    cells.sort(key=lambda cell: (cell[0]["batch_size"], cell[0]["context"]))
    for row, label in cells:
        rows.append(
            [
                label,
                f"{row['batch_size']:,}",
                f"{row['context']:,}",
                f"{row['first_token_ms']:,.1f}",
                f"{row['prefill_tokens_per_second']:,.0f}",
                f"{row['step_ms']:,.2f}",
                f"{row['step_ms_iqr']:,.2f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['uncached_step_ms']:,.1f}",
                f"{row['times_as_fast_as_uncached']:,.1f}",
                f"{row['cache_bytes'] / 2**20:,.2f}",
            ]
        )
    return rows


def decode_rows(v: Variant) -> list[Config]:
    """What was measured of a variant: of its first run that was."""
    answers = answers_of(v, "decode")
    return answers[0]["rows"] if answers else []


def decode_figure(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Tokens a second and bytes of the cache against the context, for the most texts at once."""
    shown = [(v, rows) for v in found.variants if (rows := decode_rows(v))]
    if not shown:
        return None
    batch = max(row["batch_size"] for _, rows in shown for row in rows)
    figure, (left, right) = canvas(2, height=4.2)
    for v, every in shown:
        rows = sorted((r for r in every if r["batch_size"] == batch), key=lambda r: r["context"])
        style, contexts = styles[id(v)], [row["context"] for row in rows]
        look = {
            "color": style.colour,
            "linestyle": style.line,
            "marker": style.marker,
            "markersize": 4,
        }
        left.plot(contexts, [row["tokens_per_second"] for row in rows], label=v.label, **look)
        bare = [1e3 * batch / row["uncached_step_ms"] for row in rows]
        left.plot(contexts, bare, **look | {"alpha": 0.35, "linewidth": 3, "marker": ""})
        right.plot(contexts, [row["cache_bytes"] / 2**20 for row in rows], **look)
    for axes in (left, right):
        ticks_at(axes, {row["context"] for _, rows in shown for row in rows})
        axes.set_yscale("log")
    left.set(xlabel="tokens in the cache", ylabel="tokens a second")
    right.set(xlabel="tokens in the cache", ylabel="KV cache, MiB")
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    caption = (
        f"Generation of {batch} text{'s' * (batch > 1)} at once: tokens a second with the cache (thin) and when "
        "the whole text is read again for each token (thick and pale), and the bytes that the cache holds. "
        "Measured, the variants in turn, medians."
    )
    return Figure(name, caption, svg(figure, name))


READOUTS = {
    "distance": "tokens back, mean",
    "entropy": "entropy, nats",
    "first": "share on the first token",
    "induction": "share on what followed before",
}


def attention_table(found: Study) -> Rows:
    """Means over heads, the strongest induction head, and what repetition does to the loss."""
    rows = [
        ["variant", "tokens back", "entropy", "on the first token", "strongest induction head",
         "loss, random tokens", "loss, the same again"]
    ]  # fmt: skip
    for v in found.variants:
        answers = answers_of(v, "attention")
        if not answers:
            continue

        def mean(values: Iterable[float], style: str) -> str:
            return f"{statistics.fmean(values):{style}}"

        heads = [[x for layer in a["layers"] for x in layer["induction"]] for a in answers]
        rows.append(
            [
                v.label,
                mean(every(answers, "distance"), ".1f"),
                mean(every(answers, "entropy"), ".2f"),
                mean(every(answers, "first"), ".3f"),
                mean(map(max, heads), ".3f"),
                mean((a["repeated_tokens"]["first"] for a in answers), ".3f"),
                mean((a["repeated_tokens"]["again"] for a in answers), ".3f"),
            ]
        )
    return rows


def every(answers: Sequence[Config], readout: str) -> list[float]:
    return [head for a in answers for layer in a["layers"] for head in layer[readout]]


def attention_figure(name: str, found: Study, styles: dict[int, Style]) -> Figure | None:
    """Each head as a dot, by layer and readout."""
    shown = [(v, answers[0]) for v in found.variants if (answers := answers_of(v, "attention"))]
    if not shown:
        return None
    figure, panels = canvas(4, height=5.6, rows=2)
    for axes, (readout, words) in zip(panels, READOUTS.items(), strict=True):
        for place, (v, answer) in enumerate(shown):
            style, aside = styles[id(v)], 0.6 * ((place + 0.5) / len(shown) - 0.5)
            dots = [
                (number + 1 + aside, head)
                for number, layer in enumerate(answer["layers"])
                for head in layer[readout]
            ]
            axes.plot(*zip(*dots, strict=True), linestyle="", marker=style.marker, markersize=4, alpha=0.75,
                      color=style.colour, label=v.label)  # fmt: skip
        for level in {answer["even"][readout] for _, answer in shown}:
            axes.axhline(level, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(1, 1 + max(len(answer["layers"]) for _, answer in shown)))
        axes.set(xlabel="layer", ylabel=words)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False
    )
    caption = (
        "What each head looks at, one dot a head, of the first run of each variant: how many tokens back its "
        "weights lie on average, how widely they spread, how much falls on the first token, all for the later "
        "half of the queries in real text; and, in random tokens that are repeated, how much falls on the token "
        "that followed the same one before. Dotted: attention that is even over all keys."
    )
    return Figure(name, caption, svg(figure, name))


HEADINGS = {
    "length": "Beyond the context of training",
    "decode": "Generation",
    "attention": "What the heads look at",
}


TABLES: dict[str, Callable[[Study], Rows]] = {
    "length": length_table,
    "decode": decode_table,
    "attention": attention_table,
}
FIGURES: dict[str, Callable[[str, Study, dict[int, Style]], Figure | None]] = {
    "length": length_figure,
    "decode": decode_figure,
    "attention": attention_figure,
}


def kinds() -> list[str]:
    """All kinds of evaluation: those with a table of their own in this module come first."""
    names = (choice.rpartition("/")[2] for choice in choices_of("eval"))
    return list(dict.fromkeys((*TABLES, *names)))


def table(kind: str, study: Study) -> Rows:
    """The table of a kind of evaluation; a header alone if these runs have no answers of it."""
    return TABLES[kind](study) if kind in TABLES else generic_table(kind, study)


def figure(kind: str, study: Study, styles: dict[int, Style]) -> Figure | None:
    """The figure of a kind of evaluation; None if it has none, or these runs have no answers of it."""
    return FIGURES.get(kind, generic_figure)(kind, study, styles)


def tables(study: Study) -> list[tuple[str, Rows]]:
    """A heading and a table for each kind of evaluation that these runs have answers of."""
    made = ((kind, table(kind, study)) for kind in kinds())
    return [(heading(kind, study), rows) for kind, rows in made if len(rows) > 1]


def heading(kind: str, study: Study) -> str:
    """The heading of a kind of evaluation that these runs have answers of."""
    return HEADINGS.get(kind) or generic_answers(kind, *study.variants)[0].get("title", kind)


# Other kinds of evaluation: their answers bring rows, a title and perhaps the axes of a figure, as the
# docstring of compare/evaluate describes.


def generic_answers(kind: str, *variants: Variant) -> list[Config]:
    """The answers of variants that hold rows."""
    return [answer for v in variants for answer in answers_of(v, kind) if "rows" in answer]


def generic_rows(kind: str, v: Variant) -> list[Config]:
    """The rows of a variant's answers; rows that differ in floats alone are one, with their lists."""
    rows: dict[str, Config] = {}
    for row in (row for answer in generic_answers(kind, v) for row in answer["rows"]):
        key = {name: x for name, x in row.items() if not isinstance(x, float | None)}
        merged = rows.setdefault(str(key), {name: key.get(name, []) for name in row})
        for name, x in row.items():
            if isinstance(x, float):
                merged[name].append(x)
    return list(rows.values())


def generic_table(kind: str, study: Study) -> Rows:
    """A line for each variant and row, its floats as means over runs with their interval."""
    lines = [(v.label, row) for v in study.variants for row in generic_rows(kind, v)]
    names = list(dict.fromkeys(name for _, row in lines for name in row))
    cells = ([label, *(generic_cell(row.get(name, "")) for name in names)] for label, row in lines)
    return [["variant", *names], *cells]


def generic_cell(value: Any) -> str:
    """'0.513 (0.497 to 0.529)' for a list of floats, one a run; other values as they are."""
    if not isinstance(value, list):
        return str(value)
    if not value:
        return "not defined"
    mean, low, high = mean_interval(value)
    return f"{mean:.4g}" + ("" if low is None or high is None else f" ({low:.4g} to {high:.4g})")


def generic_figure(kind: str, study: Study, styles: dict[int, Style]) -> Figure | None:
    """A curve for each variant, means over runs, if the answers name the columns of its axes."""
    answers = generic_answers(kind, *study.variants)
    if not answers or "figure" not in answers[0]:
        return None
    x, y = answers[0]["figure"]["x"], answers[0]["figure"]["y"]
    drawing, axes = canvas(1, height=4.2)
    for v in study.variants:
        points = {row[x]: statistics.fmean(row[y]) for row in generic_rows(kind, v) if row[y]}
        style = styles[id(v)]
        axes.plot(list(points), list(points.values()), label=v.label, color=style.colour,
                  linestyle=style.line, marker=style.marker, markersize=4)  # fmt: skip
    axes.set(xlabel=x, ylabel=y)
    legend(axes, len(study.variants))
    return Figure(kind, f"{heading(kind, study)}: {y} by {x}.", svg(drawing, kind))
