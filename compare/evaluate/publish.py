"""Answers of an evaluation: into each run, then together as a table, a figure and a report."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import matplotlib

from compare.evaluate.load import Opening
from compare.report.analysis import examine
from compare.report.evaluations import FIGURES, TABLES, markdown
from compare.report.runs import read
from compare.report.style import SETTINGS, styles_of
from compare.report.write import report
from data.atomic import replace, write_json
from train.config.schema import Config
from train.record.terminal import columns


def publish(kind: str, opening: Opening, answers: Iterable[tuple[Path, Config]]) -> int:
    """Write each answer into its run, then show them together: a table, a figure, a sweep's report."""
    for folder, answer in answers:
        (folder / "eval").mkdir(exist_ok=True)
        write_json(folder / "eval" / f"{kind}.json", answer)
    found = examine(read(opening.folders))
    rows = TABLES[kind](found)
    print(columns(rows))
    into = together(opening.folders) / "eval"
    into.mkdir(exist_ok=True)
    replace(into / f"{kind}.md", markdown(rows))
    with matplotlib.rc_context(SETTINGS):
        figure = FIGURES[kind](kind, found, styles_of(found))
    if figure:
        replace(into / f"{kind}.svg", figure.file)
    print(f"\nwritten: {into / kind}.md" + (" and .svg" if figure else ""))
    for sweep in (f for f in opening.folders if (f / "sweep.json").exists()):
        report(sweep)
        print(f"report:  {sweep / 'report.html'}")
    return 0


def together(folders: Sequence[Path]) -> Path:
    """The one folder, or the nearest one that holds all."""
    return Path(os.path.commonpath(folders))
