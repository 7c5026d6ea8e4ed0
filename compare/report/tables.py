"""The tables of a report."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what it needs takes seconds to import, and every run starts at this door
    from compare.report.analysis import Ruler, Study
    from compare.report.runs import Run
    from compare.report.statistics import Difference
    from compare.report.variants import Variant


def table(found: "Study") -> list[list[str]]:
    """One row a variant: what it is worth, how that differs from the baseline, and what it costs."""
    rows = [row_of(i, found) for i in range(len(found.variants))]
    return without_empty([list(rows[0]), *(list(row.values()) for row in rows)])


def row_of(place: int, found: "Study") -> dict[str, str]:
    """The cells of a variant by the heads of their columns. Intervals are in brackets."""
    from compare.report.analysis import BITS

    v, ruler, base = found.variants[place], found.ruler, found.baseline
    row, time = found.rows.get(place), found.times.get(place)
    failed = sum(run.over and not run.done for run in v.runs)
    real = "-" if row is None else verdict_in_a_word(row)
    quality = {} if ruler in (None, BITS) else {ruler.name: scores(v, ruler, 2)}
    return {
        "variant": v.label,
        "seeds": str(len(v.seeds)),
        **quality,
        "bits/byte": scores(v, BITS, 4),
        "against baseline": "baseline" if v is base else change(row),
        "real?": "" if v is base else real,
        "training s": number(v.median("train_seconds"), ",.1f"),
        "training x": ratio(v, base, "train_seconds") if found.times_compare else "-",
        "step x": "baseline" if v is base else f"{math.exp(time.mean):.2f}" if time else "-",
        "tokens/s": number(v.median("tokens_per_second"), ",.0f"),
        "attention ms": number(v.median("attention_ms"), ",.1f"),
        "peak MiB": number(v.median("peak_train_bytes"), ",.1f", 2**-20),
        "parameters": number(v.median("params"), ",.0f"),
        "KV bytes/token": number(v.median("kv_cache_bytes_per_token"), ",.0f"),
        "kernel": kernel(v),
        "failed": str(failed or ""),
    }


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
    """What one more token costs at the full context, in each attention layer: the homework's table."""
    from compare.cost.counts import decoding_costs

    if found.figure != "decoding":
        return []
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
