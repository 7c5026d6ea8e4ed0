"""Answers of an evaluation: written to each run folder, then shown as a table and a figure."""

import os
from collections.abc import Iterable
from pathlib import Path

from compare.evaluate.load import RunSelector
from compare.report.analysis import analyse
from compare.report.evaluations import evaluation
from compare.report.runs import read
from compare.report.style import render, styles_of
from compare.report.tables import markdown
from compare.report.write import report
from data.atomic import replace, write_json
from train.config.schema import Config
from train.record.terminal import columns


def publish(kind: str, selector: RunSelector, answers: Iterable[tuple[Path, Config]]) -> int:
    """Write each answer to eval/KIND.json in its run folder; show all as a table and a figure.

    Both go to eval/ in the nearest folder that holds all runs. The reports of sweeps are rewritten.
    """
    for folder, answer in answers:
        (folder / "eval").mkdir(exist_ok=True)
        write_json(folder / "eval" / f"{kind}.json", answer)
    study = analyse(read(selector.folders))
    shown = evaluation(kind, study)
    rows = shown.table(study)
    print(columns(rows))
    into = Path(os.path.commonpath(selector.folders)) / "eval"
    into.mkdir(exist_ok=True)
    replace(into / f"{kind}.md", markdown(rows))
    if drawn := render(kind, shown.draw, study, styles_of(study)):
        replace(into / f"{kind}.svg", drawn.file)
    print(f"\nwritten: {into / kind}.md" + (" and .svg" if drawn else ""))
    for sweep in (f for f in selector.folders if (f / "sweep.json").exists()):
        report(sweep)
        print(f"report:  {sweep / 'report.html'}")
    return 0
