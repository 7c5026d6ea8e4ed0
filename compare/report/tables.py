"""The tables of a report."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what it needs takes seconds to import, and every run starts at this door
    from compare.report.analysis import Ruler, Study
    from compare.report.runs import Run
    from compare.report.statistics import Difference
    from compare.report.variants import Variant


@dataclass(frozen=True)
class Column:
    """A column of the main table."""

    header: str
    cell: Callable[["Variant"], str]
    short: bool = False  # also in the table that a terminal has room for


def table(found: "Study", *, short: bool = False) -> list[list[str]]:
    """One row per variant: quality, difference from the baseline, and costs."""
    columns = [column for column in columns_of(found) if column.short or not short]
    rows = [[column.cell(v) for column in columns] for v in found.variants]
    return without_empty([[column.header for column in columns], *rows])


def columns_of(found: "Study") -> list[Column]:
    """The columns of the main table. Intervals are in brackets."""
    from compare.report.analysis import BITS

    ruler, base = found.ruler, found.baseline
    rows, times = by_variant(found, found.rows), by_variant(found, found.times)

    def quality(measured: "Ruler", digits: int) -> Column:
        return Column(measured.name, lambda v: scores(v, measured, digits), short=measured is ruler)

    def median(
        header: str, key: str, style: str, scale: float = 1.0, short: bool = False
    ) -> Column:
        return Column(header, lambda v: number(v.median(key), style, scale), short)

    def difference(v: "Variant") -> str:
        return "baseline" if v is base else change(rows.get(id(v)))

    def real(v: "Variant") -> str:
        d = rows.get(id(v))
        return "" if v is base else "-" if d is None else verdict_in_a_word(d)

    def time(v: "Variant") -> str:
        d = times.get(id(v))
        return "baseline" if v is base else f"{math.exp(d.mean):.2f}" if d else "-"

    def training_time(v: "Variant") -> str:
        return ratio(v, base, "train_seconds") if found.times_compare else "-"

    def failed(v: "Variant") -> str:
        return str(sum(run.over and not run.done for run in v.runs) or "")

    return [
        Column("variant", lambda v: v.label, short=True),
        Column("seeds", lambda v: str(len(v.seeds)), short=True),
        *([] if ruler in (None, BITS) else [quality(ruler, 2)]),
        quality(BITS, 4),
        Column("against baseline", difference, short=True),
        Column("real?", real, short=True),
        median("training s", "train_seconds", ",.1f", short=True),
        Column("training x", training_time),
        Column("step x", time, short=True),
        median("tokens/s", "tokens_per_second", ",.0f"),
        median("attention ms", "attention_ms", ",.1f"),
        median("peak MiB", "peak_train_bytes", ",.1f", 2**-20, short=True),
        median("parameters", "params", ",.0f"),
        median("KV bytes/token", "kv_cache_bytes_per_token", ",.0f", short=True),
        Column("kernel", kernel),
        Column("failed", failed, short=True),
    ]


def by_variant(found: "Study", differences: "dict[int, Difference]") -> "dict[int, Difference]":
    return {id(found.variants[i]): d for i, d in differences.items()}


def verdict_in_a_word(d: "Difference") -> str:
    """yes; noise, if the interval holds zero; open, if it does not but the correction does."""
    if d.low is None or d.high is None:
        return "-"
    return "yes" if d.real else "noise" if d.low <= 0 <= d.high else "open"


def scores(v: "Variant", ruler: "Ruler", digits: int) -> str:
    """Mean and interval over seeds of what quality is measured in: '35.43 (34.92 to 35.95)'."""
    from compare.report.analysis import scores_of
    from compare.report.statistics import mean_interval

    found = scores_of(v, ruler)
    if not found:
        return "-"
    mean, low, high = mean_interval(found)
    shown = f"{math.exp(mean):.{digits}f}"
    if low is None or high is None:
        return shown
    return f"{shown} ({math.exp(low):.{digits}f} to {math.exp(high):.{digits}f})"


def change(d: "Difference | None") -> str:
    """A paired difference of logarithms in percent: '-14.6% (-15.9% to -13.3%)'."""
    from compare.report.conclusions import percent

    if d is None:
        return "-"
    between = "" if d.low is None or d.high is None else f" ({percent(d.low)} to {percent(d.high)})"
    return percent(d.mean) + between


def ratio(v: "Variant", base: "Variant", key: str) -> str:
    """A median as a multiple of the baseline's."""
    own, other = v.median(key), base.median(key)
    if v is base:
        return "baseline"
    return "-" if own is None or not other else f"{own / other:.2f}"


def kernel(v: "Variant") -> str:
    """The kernels of a variant's layers, in all its runs."""
    kernels = (run.get("kernel") or "-" for run in v.done)
    names = (name for k in kernels for name in (k if isinstance(k, list) else [k]))
    return ", ".join(dict.fromkeys(names)) or "-"


def number(value: float | None, style: str, scale: float = 1.0) -> str:
    return "-" if value is None else f"{value * scale:{style}}"


NOTHING = ("", "-", "baseline")


def without_empty(rows: list[list[str]]) -> list[list[str]]:
    """A table without the columns that say nothing in any row."""
    keep = [
        i for i in range(len(rows[0])) if any(row[i] not in NOTHING for row in rows[1:]) or i < 2
    ]
    return [[row[i] for i in keep] for row in rows]


def stage_table(found: "Study") -> list[list[str]]:
    """Each stage of runs that have several: training loss at its end, validation, time of a step."""
    if all(len(run.stages) < 2 for v in found.variants for run in v.runs):
        return []
    rows = [
        [
            "variant",
            "stage",
            "iterations",
            "context",
            "training loss",
            "validation loss",
            "perplexity",
            "step ms",
        ]
    ]
    for v in found.variants:
        deepest = max(len(run.stages) for run in v.runs)
        for stage in range(deepest):
            runs = [
                run.stages[stage]
                for run in v.runs
                if len(run.stages) > stage and run.stages[stage].done
            ]
            if runs:
                rows.append([v.label, str(stage + 1), *stage_cells(runs)])
    return rows


def stage_cells(runs: Sequence["Run"]) -> list[str]:
    def mean(key: str, style: str) -> str:
        values = [run.get(key) for run in runs if run.get(key) is not None]
        return f"{sum(values) / len(values):{style}}" if values else "-"

    context = runs[0].config.get("model", {}).get("max_len", "-")
    cells = [mean("steps", ".0f"), str(context), mean("train_loss", ".4f"), mean("val_loss", ".4f")]
    return [*cells, mean("val_perplexity", ".2f"), mean("step_ms", ",.1f")]


def start_table(found: "Study") -> list[list[str]]:
    """Runs that began with another's weights: validation loss there, at their start and at their end."""
    rows = [["variant", "loss of the given run", "at the start", "at the end", "steps"]]
    for v in found.variants:
        origins = [
            run.origin_loss for run in v.done if run.get("start_val_loss") and not run.parent
        ]
        if origins and origins[0] is not None:
            losses = (origins[0], v.mean("start_val_loss"), v.mean("val_loss"))
            rows.append(
                [v.label, *(number(x, ".4f") for x in losses), number(v.mean("steps"), ".0f")]
            )
    return rows if len(rows) > 1 else []


def rate_table(found: "Study") -> list[list[str]]:
    """Where several learning rates were tried: each variant at the shared rate and at its own best."""
    from compare.report.analysis import score_of
    from compare.report.variants import Variant

    ruler, shared = found.ruler, found.rate
    if ruler is None or shared is None:
        return []
    tried: dict[str, dict[float, float]] = {}
    for v in found.variants:
        rest = Variant({k: w for k, w in v.factors.items() if k != "optim.lr"}).label
        score = score_of(v, ruler)
        if score is not None:
            tried.setdefault(rest, {})[v.factors["optim.lr"]] = math.exp(score)
    rows = [
        [
            "variant",
            f"at the shared rate {shared:g}",
            "best rate",
            "at its best rate",
            "change",
            "remark",
        ]
    ]
    for rest, scores in tried.items():
        best = min(scores, key=scores.__getitem__)
        edge = best in (min(scores), max(scores)) and len(scores) > 1
        at_shared = scores.get(shared)
        gained = "-" if at_shared is None else f"{scores[best] / at_shared - 1:+.1%}"
        cells = [rest, number(at_shared, ".2f"), f"{best:g}", f"{scores[best]:.2f}", gained]
        rows.append([*cells, "the best lies at the edge: try further rates" if edge else ""])
    return rows


def decoding_table(found: "Study") -> list[list[str]]:
    """The cost of one more token at the full context, per attention layer, by count."""
    from compare.cost.counts import decoding_costs

    rows = [
        [
            "variant",
            "tokens before",
            "multiply-adds, no cache",
            "with cache",
            "saved",
            "KV numbers kept",
        ]
    ]
    for v in found.variants:
        config = v.runs[0].config
        if not config:
            continue
        end, layers = decoding_costs(config)[-1], config["model"]["n_layers"]
        counts = (end.multiply_adds_uncached, end.multiply_adds)
        cells = [v.label, f"{end.length:,}", *(f"{count / layers:,.0f}" for count in counts)]
        rows.append([*cells, f"{end.saved:.1%}", f"{end.cache_elements / layers:,.0f}"])
    return rows
