"""The report of a sweep: report.html, report.md, results.csv, results.json and figures/."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what it needs takes seconds to import, and every run starts at this door
    from compare.report.analysis import Study
from compare.report.tables import decoding_table, rate_table, stage_table, start_table, table
from data.atomic import read_json
from train.config.old_spellings import report_keys
from train.config.options import Reporting
from train.config.schema import arguments


def report(folder: Path) -> str:
    """Write the report of a sweep into its folder; the verdict and the table, for a terminal."""
    return write([folder])


def write(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Write the report of these runs into the first folder; the verdict and the table in words.

    Raises ValueError if there are no runs, or no such baseline.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from compare.report import evaluations as readouts
    from compare.report.analysis import study
    from compare.report.conclusions import cache_savings, methods, sentences
    from compare.report.figures import figures, with_lead
    from data.atomic import replace, write_json
    from train.record.terminal import columns

    found = study(folders, baseline)
    options = reporting(folders[0])
    drawn = with_lead(figures(found), options)
    counted = "decoding" in options.tables
    parts: dict[str, Any] = {
        "title": options.title or folders[0].name,
        "verdict": (cache_savings(found) if counted else []) + sentences(found),
        "notes": options.notes,
        "warnings": found.warnings,
        "table": table(found),
        "stages": stage_table(found),
        "starts": start_table(found),
        "rates": rate_table(found),
        "decoding": decoding_table(found) if counted else [],
        "readouts": readouts.tables(found),
        "methods": methods(found),
        "samples": samples(found),
        "failures": failures(found),
        "figures": drawn,
    }
    into = folders[0]
    (into / "figures").mkdir(exist_ok=True)
    for old in (into / "figures").glob("*.svg"):
        old.unlink()
    for figure in drawn:
        replace(into / "figures" / f"{figure.name}.svg", figure.file)
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=lambda name: name is not None and ".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["bold"] = bold
    for name in ("report.html", "report.md"):
        replace(into / name, templates.get_template(f"{name}.jinja").render(parts))
    replace(into / "results.csv", results_csv(found))
    write_json(into / "results.json", results_json(found, parts))
    said = [line.replace("**", "") for line in parts["verdict"]]
    said += [f"warning: {line}" for line in found.warnings]
    return "\n".join(
        [columns(table(found, short=True)), "", *said, "", f"report: {into / 'report.html'}"]
    )


def reporting(folder: Path) -> Reporting:
    """The options of a sweep's report; the defaults for runs that were no sweep.

    Raises ValueError if its sweep.json has others than a config may have.
    """
    path = folder / "sweep.json"
    saved = report_keys(read_json(path) if path.exists() else {})
    return Reporting(**arguments("report", saved, Reporting)[0])


def bold(text: str) -> Any:
    """Words between ** in bold, all else escaped."""
    from markupsafe import Markup, escape

    pieces = str(escape(text)).split("**")
    return Markup("".join(f"<b>{p}</b>" if i % 2 else p for i, p in enumerate(pieces)))


def samples(found: "Study") -> list[tuple[str, str]]:
    """What the first finished run of each variant wrote, stage by stage."""
    from train.record.terminal import printable

    shown = []
    for v in found.compared:
        for run in (v.done or v.runs)[:1]:
            several = len(run.stages) > 1
            for number, stage in enumerate(run.stages, 1):
                if stage.sample.strip():
                    name = f"{v.label}, after stage {number}" if several else v.label
                    shown.append((name, printable(stage.sample)[:800]))
    return shown


def failures(found: "Study") -> list[list[str]]:
    """Runs without a result, and why."""
    rows = [["run", "state", "reason", "last step"]]
    for run in (run for v in found.variants for run in v.runs if run.over and not run.done):
        state = [str(run.status.get(key) or "-") for key in ("state", "reason", "last_step")]
        rows.append([run.folder.name, *state])
    return rows if len(rows) > 1 else []


def results_csv(found: "Study") -> str:
    """One row a run, those of earlier stages included: its state and its whole summary."""
    runs = [stage for v in found.variants for run in v.runs for stage in run.stages]
    keys = list(dict.fromkeys(key for run in runs for key in run.summary if key != "parent"))
    file = io.StringIO()
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["run", "state", "reason", *keys])
    for run in dict.fromkeys(runs):
        values = [run.summary.get(key) for key in keys]
        cells = [json.dumps(v) if isinstance(v, list) else "" if v is None else v for v in values]
        rows.writerow(
            [run.folder.name, run.status.get("state"), run.status.get("reason") or "", *cells]
        )
    return file.getvalue()


def results_json(found: "Study", parts: dict[str, Any]) -> dict[str, Any]:
    """All that the report says, for programs."""
    from dataclasses import asdict

    return {
        "title": parts["title"],
        "metric": found.ruler.key if found.ruler else None,
        "baseline": found.baseline.label,
        "shared_rate": found.rate,
        "verdict": [line.replace("**", "") for line in parts["verdict"]],
        "warnings": found.warnings,
        "variants": [
            {
                "label": v.label,
                "factors": v.factors,
                "seeds": sorted(v.seeds),
                "runs": [run.folder.name for run in v.runs],
                "difference": judged(found.rows.get(i)),
                "time": judged(found.times.get(i)),
                "means": {key: v.mean(key) for key in MEANS},
            }
            for i, v in enumerate(found.variants)
        ],
        "comparisons": [
            asdict(c) | {"quality": judged(c.quality), "time": judged(c.time)}
            for c in found.comparisons
        ],
        "methods": parts["methods"],
        "failures": parts["failures"][1:],
    }


def judged(difference: Any) -> dict[str, Any] | None:
    """A difference of logarithms, and whether it is called real."""
    from dataclasses import asdict

    return None if difference is None else asdict(difference) | {"real": difference.real}


MEANS = ("val_perplexity", "val_bits_per_byte", "train_loss", "train_seconds", "step_ms", "tokens_per_second",
         "attention_ms", "peak_train_bytes", "params", "kv_cache_bytes_per_token", "flops_per_token")  # fmt: skip
