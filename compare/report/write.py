"""The report of a sweep: report.html, report.md, results.csv, results.json and figures/."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from compare.report.analysis import Study, analyse_folders
from compare.report.curves import ladder, worth
from compare.report.evaluations.kinds import evaluation, kinds
from compare.report.figures import figures, files_of
from compare.report.tables import (
    Rows,
    decoding_table,
    main_table,
    markdown,
    rate_table,
    stage_table,
    start_table,
)
from compare.report.verdict.claim import Outcome, facts, outcome, sentence
from compare.report.verdict.conclusions import cache_savings, conclusions, methods
from compare.statistics.paired import Difference
from data.atomic import replace, write_json
from train.config.old_spellings import report_keys
from train.config.options import Reporting, claim_of
from train.config.schema import arguments
from train.record.run_folder import load_manifest
from train.record.terminal import columns, printable


def report(folder: Path) -> str:
    """Write the report of a sweep into its folder; its table and conclusions, for a terminal."""
    return write([folder])


def write(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Write the report of runs into the first folder; its table and conclusions, for a terminal.

    Raises ValueError if there are no runs, or no such baseline.
    """
    into, study, options = folders[0], analyse_folders(folders, baseline), reporting(folders[0])
    counted = "decoding" in options.tables
    claim = claim_of(options) if baseline is None else None  # a claim names its own
    asked = outcome(study, claim) if claim else None
    content: dict[str, Any] = {
        "title": options.title or into.name,
        "verdict": ([sentence(asked)] if asked else [])
        + (cache_savings(study) if counted else [])
        + conclusions(study),
        "nothing": nothing(study),
        "notes": options.notes,
        "warnings": study.warnings,
        "sections": sections(study, counted),
        "methods": methods(study),
        "samples": samples(study),
        "figures": figures(study, options),
    }
    (into / "figures").mkdir(exist_ok=True)
    for old in files_of(options):  # others are not ours
        (into / "figures" / old).unlink(missing_ok=True)
    for figure in content["figures"]:
        replace(into / "figures" / f"{figure.name}.svg", figure.file)
    for name in ("report.html", "report.md"):
        replace(into / name, TEMPLATES.get_template(f"{name}.jinja").render(content))
    replace(into / "results.csv", results_csv(study))
    write_json(into / "results.json", results_json(study, content, asked))
    lines = [line.replace("**", "") for line in content["verdict"]]
    lines += [f"warning: {line}" for line in study.warnings]
    table = columns(main_table(study, short=True))
    return "\n".join([table, "", *lines, "", f"report: {into / 'report.html'}"])


def nothing(study: Study) -> str:
    """Why there is no verdict, where there is none."""
    if not study.over:
        return "Nothing to compare yet."
    if study.rate is not None:
        return "Nothing to compare: no two variants have the same learning rate."
    return "Nothing to compare."


def reporting(folder: Path) -> Reporting:
    """The options of a sweep's report; the defaults for runs that were no sweep.

    Raises ValueError if its sweep.json has others than a config may have.
    """
    saved = report_keys(load_manifest(folder))
    return Reporting(**arguments("report", saved, Reporting)[0])


def bold(text: str) -> Markup:
    """HTML with the words between ** in bold."""
    parts = str(escape(text)).split("**")
    return Markup("".join(f"<b>{part}</b>" if i % 2 else part for i, part in enumerate(parts)))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    autoescape=lambda name: name is not None and ".html" in name,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"bold": bold, "markdown": markdown}


def sections(study: Study, decoding: bool) -> list[tuple[str, str, Rows]]:
    """Headings, notes and tables that have rows."""
    loss = "Training loss is the mean of the last 50 iterations."
    every = [
        ("Table", "", main_table(study)),
        (worth.HEADING, worth.worth_note(study), worth.worth_table(study)),
        (ladder.HEADING, ladder.ladder_note(study), ladder.ladder_table(study)),
        ("By stage", loss, stage_table(study)),
        ("Initialised from another run", "", start_table(study)),
        ("By learning rate", "", rate_table(study)),
        (
            "Multiply-adds to decode one token, per attention layer",
            "",
            decoding_table(study) if decoding else [],
        ),
        *((e.heading, "", e.table(study)) for e in (evaluation(kind, study) for kind in kinds())),
        ("Runs without a result", "", failures(study)),
    ]
    return [section for section in every if len(section[-1]) > 1]


def samples(study: Study) -> list[tuple[str, str]]:
    """Text generated by the first finished run of each variant, stage by stage."""
    runs = [(v, run) for v in study.compared for run in (v.done or v.runs)[:1]]
    return [
        (
            v.label if len(run.stages) == 1 else f"{v.label}, after stage {number}",
            printable(stage.sample)[:800],
        )
        for v, run in runs
        for number, stage in enumerate(run.stages, 1)
        if stage.sample.strip()
    ]


def failures(study: Study) -> Rows:
    """Runs without a result, with state, reason and last step; empty without any."""
    runs = [run for v in study.variants for run in v.runs if run.over and not run.done]
    facts = [(run.status.get("state"), run.reason, run.status.get("last_step")) for run in runs]
    rows = [
        [run.folder.name, *(str(fact or "-") for fact in its)]
        for run, its in zip(runs, facts, strict=True)
    ]
    return [["run", "state", "reason", "last step"], *rows] if rows else []


def results_csv(study: Study) -> str:
    """One row per run, those of earlier stages included: its state and its whole summary."""
    runs = dict.fromkeys(stage for v in study.variants for run in v.runs for stage in run.stages)
    rows = [
        {
            "run": run.folder.name,
            "state": run.status.get("state"),
            "reason": run.status.get("reason"),
        }
        | {k: json.dumps(x) if isinstance(x, list) else x for k, x in run.summary.items()}
        for run in runs
    ]
    table = pd.DataFrame(rows, dtype=object).drop(columns="parent", errors="ignore")
    return str(table.to_csv(index=False, lineterminator="\n"))


def results_json(study: Study, content: dict[str, Any], asked: Outcome | None) -> dict[str, Any]:
    """All facts of the report, for programs."""
    return {
        "title": content["title"],
        "metric": study.metric.key if study.metric else None,
        "baseline": study.baseline.label,
        "shared_rate": study.rate,
        "verdict": [line.replace("**", "") for line in content["verdict"]],
        "warnings": study.warnings,
        "variants": [
            {
                "label": v.label,
                "factors": v.factors,
                "seeds": sorted(v.seeds),
                "runs": [run.folder.name for run in v.runs],
                "difference": difference_json(study.differences.get(v)),
                "time": difference_json(study.times.get(v)),
                "means": {key: v.mean(key) for key in MEANS},
            }
            for v in study.variants
        ],
        "comparisons": [
            asdict(c) | {"quality": difference_json(c.quality), "time": difference_json(c.time)}
            for c in study.comparisons
        ],
        **({"worth": judged} if (judged := list(map(asdict, worth.worths(study)))) else {}),
        **({"claim": facts(asked, study)} if asked else {}),
        **({"ladder": climbed} if (climbed := list(map(asdict, ladder.ladders(study)))) else {}),
        "methods": content["methods"],
        "failures": failures(study)[1:],
    }


def difference_json(difference: Difference | None) -> dict[str, Any] | None:
    """A difference of logarithms; `real` is true if it is significant."""
    return None if difference is None else asdict(difference) | {"real": difference.significant}


MEANS = ("val_perplexity", "val_bits_per_byte", "train_loss", "train_seconds", "step_ms", "tokens_per_second",
         "attention_ms", "peak_train_bytes", "params", "kv_cache_bytes_per_token", "flops_per_token")  # fmt: skip
