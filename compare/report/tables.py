"""The tables of a report: lists of rows of cells, the header first."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import pandas as pd

from compare.cost.counts import decoding_costs
from compare.report.analysis import BITS, Metric, Study
from compare.report.variants import Variant
from compare.statistics.paired import mean_interval, percent, ratio, with_interval

Rows = list[list[str]]


@dataclass(frozen=True)
class Column:
    """A column of the main table."""

    header: str
    cell: Callable[[Variant], str]
    short: bool = False  # also in the table for a terminal


def main_table(study: Study, *, short: bool = False) -> Rows:
    """One row per variant: quality, difference from the baseline, and costs."""
    columns = [column for column in columns_of(study) if column.short or not short]
    rows = [[column.cell(v) for column in columns] for v in study.variants]
    return without_empty([[column.header for column in columns], *rows])


def columns_of(study: Study) -> list[Column]:
    """The columns of the main table; intervals are in parentheses."""
    metric = study.metric

    def quality(measure: Metric, digits: int) -> Column:
        def cell(v: Variant) -> str:
            scores = [s for s in map(measure.score, v.done) if s is not None]
            return exp_with_interval(scores, digits)

        return Column(measure.name, cell, short=measure is metric)

    def median(
        header: str, key: str, style: str, scale: float = 1.0, short: bool = False
    ) -> Column:
        return Column(header, lambda v: number(v.median(key), style, scale), short)

    def against_base(header: str, cell: Callable[[Variant], str], short: bool = True) -> Column:
        def compared(v: Variant) -> str:
            return "baseline" if study.baselines.get(v) is v else cell(v)

        return Column(header, compared, short)

    def change(v: Variant) -> str:
        d = study.differences.get(v)
        return with_interval(d.mean, d.low, d.high, percent) if d else "-"

    def significance(v: Variant) -> str:
        return study.differences[v].significance if v in study.differences else ""

    def step_time(v: Variant) -> str:
        return f"{math.exp(study.times[v].mean):.2f}" if v in study.times else "-"

    def training_time(v: Variant) -> str:
        base = study.baselines.get(v)
        seconds, of_base = v.median("train_seconds"), base and base.median("train_seconds")
        if seconds is None or not of_base or not study.times_compare:
            return "-"
        return f"{seconds / of_base:.2f}"

    def above_entropy(v: Variant) -> str:
        """Nats per token above the floor, where the text has a known one."""
        losses = [(run.get("val_loss"), run.get("entropy_floor")) for run in v.done]
        above = [
            loss - floor
            for loss, floor in losses
            if loss is not None and floor is not None and math.isfinite(loss)
        ]
        return with_interval(*mean_interval(above), lambda x: f"{x:.4f}") if above else "-"

    def failed(v: Variant) -> str:
        return str(sum(run.over and not run.done for run in v.runs) or "")

    def trained(v: Variant) -> str:
        """Trained parameters, where some are frozen."""
        some = any(other.median("params_trained") != other.median("params") for other in finetuned)
        return number(v.median("params_trained"), ",.0f") if some else ""

    finetuned = [v for v in study.variants if v.median("params_trained") is not None]
    return [
        Column("variant", lambda v: v.label, short=True),
        Column("seeds", lambda v: str(len(v.seeds)), short=True),
        *([] if metric in (None, BITS) else [quality(metric, 2)]),
        quality(BITS, 4),
        Column("above the entropy", above_entropy),
        against_base("vs. baseline", change),
        Column("significant?", significance, short=True),
        median("training s", "train_seconds", ",.1f", short=True),
        against_base("training time (relative)", training_time, short=False),
        against_base("step time (relative)", step_time),
        median("tokens/s", "tokens_per_second", ",.0f"),
        median("attention ms", "attention_ms", ",.1f"),
        median("peak MiB", "peak_train_bytes", ",.1f", 2**-20, short=True),
        median("parameters", "params", ",.0f"),
        Column("trained", trained),
        median("KV bytes/token", "kv_cache_bytes_per_token", ",.0f", short=True),
        Column("kernel", kernel),
        Column("failed", failed, short=True),
    ]


def exp_with_interval(scores: Sequence[float], digits: int) -> str:
    """The mean score and its interval through exp: '35.43 (34.92 to 35.95)'; '-' without scores."""
    if not scores:
        return "-"
    return with_interval(*mean_interval(scores), lambda x: f"{ratio(x):.{digits}f}")


def kernel(v: Variant) -> str:
    """The attention kernels of all layers in all runs."""
    kernels = (run.get("kernel") or "-" for run in v.done)
    names = (name for k in kernels for name in (k if isinstance(k, list) else [k]))
    return ", ".join(dict.fromkeys(names)) or "-"


def number(value: float | None, style: str, scale: float = 1.0) -> str:
    return "-" if value is None or math.isnan(value) else f"{value * scale:{style}}"


def without_empty(rows: Rows) -> Rows:
    """A table without the columns that are empty in every row, except the first two."""
    columns = list(zip(*rows, strict=True))
    filled = [c for i, c in enumerate(columns) if i < 2 or set(c[1:]) - {"", "-", "baseline"}]
    return [list(row) for row in zip(*filled, strict=True)]


def table_of(records: Iterable[dict[str, str]]) -> Rows:
    """A table of records, their keys as its header; empty without records."""
    rows = list(records)
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def markdown(rows: Rows) -> str:
    """A table in Markdown: the first column to the left, all others to the right."""
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return "\n".join([lines[0], f"|---{'|---:' * (len(rows[0]) - 1)}|", *lines[1:]]) + "\n"


#: Columns of the stage table: keys, headers and formats.
STAGE = {
    "steps": ("iterations", ".0f"),
    "max_len": ("context", ".0f"),
    "train_loss": ("training loss", ".4f"),
    "val_loss": ("validation loss", ".4f"),
    "val_perplexity": ("perplexity", ".2f"),
    "step_ms": ("step ms", ",.1f"),
}


def stage_table(study: Study) -> Rows:
    """Losses and step time at the end of each stage, means over seeds; empty without stages."""
    stages = pd.DataFrame(
        {"variant": v, "stage": number}
        | {key: stage.get(key) for key in STAGE}
        | {"max_len": stage.config.get("model", {}).get("max_len")}
        for v in study.variants
        for run in v.runs
        for number, stage in enumerate(run.stages, 1)
        if stage.done
    )
    if stages.empty or stages.stage.max() < 2:
        return []
    means = stages.astype(dict.fromkeys(STAGE, float)).groupby(["variant", "stage"], sort=False)
    return table_of(
        {"variant": v.label, "stage": str(stage)}
        | {header: number(row[key], style) for key, (header, style) in STAGE.items()}
        for (v, stage), row in means[list(STAGE)].mean().iterrows()
    )


def start_table(study: Study) -> Rows:
    """Validation losses of runs that were initialised from another run, and of that run."""
    origins = {
        v: [run.origin_loss for run in v.done if run.get("start_val_loss") and not run.parent]
        for v in study.variants
    }
    return table_of(
        {
            "variant": v.label,
            "loss of that run": number(losses[0], ".4f"),
            "at the start": number(v.mean("start_val_loss"), ".4f"),
            "at the end": number(v.mean("val_loss"), ".4f"),
            "steps": number(v.mean("steps"), ".0f"),
        }
        for v, losses in origins.items()
        if losses and losses[0] is not None
    )


def rate_table(study: Study) -> Rows:
    """Each variant at the shared learning rate and at its best one; empty if one was tried."""
    if study.rate is None or study.metric is None:
        return []
    tried: dict[str, dict[float, float]] = {}
    for v, quality in study.quality.items():
        tried.setdefault(v.without("optim.lr").label, {})[v.factors["optim.lr"]] = quality
    rows = []
    for label, by_rate in tried.items():
        best, shared = min(by_rate, key=by_rate.__getitem__), by_rate.get(study.rate)
        at_edge = len(by_rate) > 1 and best in (min(by_rate), max(by_rate))
        rows.append(
            {
                "variant": label,
                f"{study.metric.name} at {study.rate:g}": number(shared, ".2f"),
                "best rate": f"{best:g}",
                f"{study.metric.name} at best rate": f"{by_rate[best]:.2f}",
                "change": "-" if shared is None else f"{by_rate[best] / shared - 1:+.1%}",
                "remark": "best rate at the edge of the range: try further rates"
                if at_edge
                else "",
            }
        )
    return table_of(rows)


def decoding_table(study: Study) -> Rows:
    """Multiply-adds to decode one token at the full context, per attention layer, by count."""
    ends = {v: decoding_costs(v.runs[0].config)[-1] for v in study.variants if v.runs[0].config}
    layers = {v: v.runs[0].config["model"]["n_layers"] for v in ends}
    return table_of(
        {
            "variant": v.label,
            "tokens before": f"{end.length:,}",
            "without cache": f"{end.multiply_adds_uncached / layers[v]:,.0f}",
            "with cache": f"{end.multiply_adds / layers[v]:,.0f}",
            "saved": f"{end.saved:.1%}",
            "KV numbers stored": f"{end.cache_elements / layers[v]:,.0f}",
        }
        for v, end in ends.items()
    )
