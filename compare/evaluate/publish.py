"""Answers of an evaluation: written to each run folder, then shown as a table and a figure."""

import os
from collections.abc import Iterable
from pathlib import Path

from compare.evaluate.load import RunSelector
from compare.report.analysis import analyse
from compare.report.evaluations.kinds import evaluation
from compare.report.runs import read
from compare.report.style import render, styles_of
from compare.report.tables import markdown
from compare.report.write import report
from data.atomic import replace, write_json
from train.config.schema import Config
from train.record.terminal import columns


def publish(
    kind: str, selector: RunSelector, answers: Iterable[tuple[Path, Config]], *more: str
) -> int:
    """Write each answer to eval/KIND.json in its run folder; show all as a table and a figure.

    `more` names further tables and figures of the same answers. All go to eval/ in the nearest
    folder that holds all runs. The reports of sweeps are rewritten.
    """
    for folder, answer in answers:
        (folder / "eval").mkdir(exist_ok=True)
        write_json(folder / "eval" / f"{kind}.json", answer)
    study = analyse(read(selector.folders))
    holding = Path(os.path.commonpath([folder.resolve() for folder in selector.folders]))
    here = Path.cwd()
    into = (holding.relative_to(here) if holding.is_relative_to(here) else holding) / "eval"
    into.mkdir(exist_ok=True)
    for name in (kind, *more):
        shown, written = evaluation(name, study), []
        if len(rows := shown.table(study)) > 1:
            print(columns(rows))
            replace(into / f"{name}.md", markdown(rows))
            written.append(".md")
        if drawn := render(name, shown.draw, study, styles_of(study)):
            replace(into / f"{name}.svg", drawn.file)
            written.append(".svg")
        if written:
            print(f"\nwritten: {into / name}{' and '.join(written)}\n")
    for sweep in (f for f in selector.folders if (f / "sweep.json").exists()):
        report(sweep)
        print(f"report:  {sweep / 'report.html'}")
    return 0
