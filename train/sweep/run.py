"""Many runs that end in one report: which there are, which are still to do, and how they stand."""

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from data.atomic import write_json
from train.config.compose import compose, quoted
from train.config.options import SweepOptions
from train.config.schema import Config
from train.record.run_folder import load_summary
from train.record.terminal import duration, say
from train.setup.match import baseline_of
from train.sweep.apart import apart
from train.sweep.display import Board, Watched
from train.sweep.evaluations import evaluate
from train.sweep.expand import ROUNDS
from train.sweep.hydra_launcher import elsewhere
from train.sweep.plan import Cell, known_runs, plan_cells, refuse_changed_text
from train.sweep.processes import Place, Start, Stop, launch_here, starting, status_of
from train.sweep.rounds import asked
from train.sweep.slots import Slot, slots, visible_gpus

T = TypeVar("T")
QUIET = 30.0  # seconds of a sweep before its first report; each takes a few
REPORTING = 0.005  # of a sweep's time at most, before its last report


def sweep(
    cells: list[list[str]],
    settings: SweepOptions,
    launcher: list[str],
    forecast: Callable[[list[tuple[str, Config]], int, Callable[..., Any]], dict[str, float]],
    report: Callable[[Path], str],
    undecided: Callable[[Path], list[str]],
) -> int:
    """Train every cell in a process of its own, evaluate as `report.evaluate` asks, and report on all;
    1 if one of them failed.

    All are checked before any starts. Started again in the same folder, it skips what is done, resumes
    what was interrupted, and retries what failed if `retry`. `launcher` are the overrides that name
    another one than processes here. `forecast` tells the seconds of runs, so many side by side, and is
    given what calls a function apart from this process. With `seeds`, the cells have more seeds than
    may be needed; rounds of more of them go on with the runs that are `undecided`.
    """
    started, first = time.monotonic(), compose(cells[0])
    name = time.strftime("%Y%m%d-%H%M%S") if first["name"] is None else first["name"]
    parent = Path(str(Path("outputs/sweeps") / str(name) if first["out"] is None else first["out"]))
    gpus = [] if launcher else visible_gpus(first["device"])
    manifest = partial(
        write_manifest,
        parent,
        first,
        baseline=first["baseline"] or baseline_of(cells[0]),
        margin=settings.margin if settings.seeds else None,
    )
    with ExitStack() as held:
        with apart(bool(gpus)) as ask:
            every = ask(plan_cells, cells, first, parent, here=not launcher)
            planned = asked(every, ROUNDS[0], None) if settings.seeds else every
            check_jobs(settings.jobs, launcher)
            there = elsewhere(launcher, parent / ".hydra") if launcher else None
            refuse_changed_text(planned)
            held.callback(locked(parent).release)
            manifest(planned)
            todo = [cell for cell in planned if to_do(cell, settings.retry)]
            fresh = not any(status_of(cell.folder) for cell in planned)
            if len(todo) < len(planned):
                say(f"{len(planned) - len(todo)} of {len(planned)} runs need nothing more")
            runs = [(cell.name, cell.config) for cell in todo]
            places = slots(settings.jobs, gpus, max(cell.config["gpus"] for cell in planned))
            seconds = forecast(runs, len(places), ask) if runs and not there else {}
        number = 0 if there else len(every if settings.seeds else todo)
        start = held.enter_context(starting(number, places[0].environment()))
        try:
            tried = {cell.name for cell in todo}
            run_all(planned, todo, seconds, there, places, start, safely(report, ""))
            for seeds in ROUNDS[1:] if settings.seeds else ():
                going = safely(undecided, list[str]())(parent)
                if not going:
                    break
                more = asked(every, seeds, going)
                planned = [cell for cell in every if cell in planned or cell in more]
                manifest(planned)
                todo = [
                    cell
                    for cell in planned
                    if to_do(cell, retry=settings.retry and cell.name not in tried)
                ]
                tried |= {cell.name for cell in todo}
                say(f"{seeds} seeds for what is not decided: {len(todo)} runs more")
                run_all(planned, todo, {}, there, places, start, safely(report, ""))
            failed_evaluations = evaluate(parent, first["report"]["evaluate"])
            verdict = safely(report, "")(parent)
        except Stop as stop:
            place = f"out={parent}" if first["name"] is None else f"name={first['name']}"
            say(f"interrupted; the same command with {place} goes on")
            return 128 + int(stop.args[0])
    failed_runs = say_failures(planned)
    print(verdict)
    if fresh and not there:
        say_share(planned, len(places), time.monotonic() - started)
    lines = len(first["report"]["evaluate"])
    also = f", {failed_evaluations} of {lines} evaluations failed" if failed_evaluations else ""
    print(f"\nsweep: {parent}  ({len(planned)} runs, {failed_runs} failed{also})")
    return 1 if failed_runs or failed_evaluations else 0


def check_jobs(jobs: str | int, launcher: list[str]) -> None:
    """Raise ValueError for a number of runs side by side that another launcher would not heed."""
    if launcher and jobs not in ("auto", 1):
        raise ValueError(
            f"jobs={jobs} is for runs on this machine; {launcher[0]} has keys of its own"
        )


def locked(parent: Path) -> FileLock:
    """The lock of a sweep's folder, which is made. Raises ValueError if another process has it."""
    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{parent} is in use by another sweep") from error
    return lock


def write_manifest(
    parent: Path, first: Config, planned: list[Cell], *, baseline: str, margin: float | None
) -> None:
    """Write sweep.json: what was asked for last, and every other run that the folder has known.

    `margin` is that of seeds in rounds.
    """
    told = ("name", "overrides", "stage", "parent", "config")
    cells = [{key: getattr(cell, key) for key in told} for cell in planned]
    now = {cell.name for cell in planned}
    content = {
        "command": sys.argv,
        **first["report"],
        "baseline": baseline,
        "margin": margin,
        "cells": cells,
        "known": [entry for name, entry in known_runs(parent).items() if name not in now],
    }
    write_json(parent / "sweep.json", content)


def to_do(cell: Cell, retry: bool) -> bool:
    """Whether a run is still to be trained, or resumed for a summary that it could not write.

    A run that failed is left alone unless `retry`.
    """
    found = state(cell.folder)["state"]
    if found == "done":
        return load_summary(cell.folder) is None
    return retry or found != "failed"


def say_failures(planned: list[Cell]) -> int:
    """Say why runs have no result, and return how many have none."""
    found = {cell.name: state(cell.folder) for cell in planned}
    failed = {name: how for name, how in found.items() if how["state"] != "done"}
    for name, how in failed.items():
        say(f"{name}: {how['state']}: {how['reason']}")
    return len(failed)


def say_share(planned: list[Cell], places: int, wall: float) -> None:
    """Say how much of a sweep's seconds its training steps took, of runs that have a summary."""
    summaries = [load_summary(cell.folder) or {} for cell in planned]
    clocks = ("warmup_seconds", "train_seconds")
    trained = sum(summary.get(clock) or 0.0 for summary in summaries for clock in clocks)
    share = trained / min(places, len(planned)) / wall
    say(f"training steps took {share:.0%} of {duration(wall)}")


def state(folder: Path) -> dict[str, Any]:
    """How a run stands: state, reason and last step, from its status.json."""

    return status_of(folder) or {"state": "waiting", "reason": None, "last_step": None}


def run_all(
    planned: list[Cell],
    todo: list[Cell],
    forecast: dict[str, float],
    there: Place | None,
    places: list[Slot],
    start: Start,
    report: Callable[[Path], str],
) -> None:
    """Run what is to do, stage by stage, seed by seed, and show how all stands.

    `forecast` has the seconds that runs are expected to take, by name; `start` starts those that are run
    here, in these places.
    """
    parent = planned[0].folder.parent
    if len(places) > 1 and todo:
        shared = "runs share the machine, so their times are not comparable"
        own = all(place.sharing == 1 for place in places)
        say(f"jobs={len(places)}: {'each with a GPU of its own' if own else shared}")
    alike = any(cell.name not in forecast for cell in todo)  # where one is not known
    expected = {cell.name: 1.0 if alike else forecast[cell.name] for cell in todo}
    runs = [
        Watched(cell.name, cell.folder, cell.config["steps"], expected.get(cell.name, 0.0))
        for cell in planned
    ]
    due = time.monotonic() + QUIET
    with Board(runs) as board:

        def ended(folder: Path) -> None:
            nonlocal due
            board.ended(folder)
            began = time.monotonic()
            if began >= due:
                report(parent)  # before the next run is on the clock
                due = time.monotonic() + (time.monotonic() - began) / REPORTING

        for stage in sorted({cell.stage for cell in todo}):
            ready = []
            for cell in (cell for cell in todo if cell.stage == stage):
                before = parent / cell.parent if cell.parent else None
                if before and state(before)["state"] != "done":
                    cell.folder.mkdir(exist_ok=True)
                    why = {"state": "waiting", "reason": f"{cell.parent} did not end well"}
                    write_json(cell.folder / "status.json", why | {"last_step": None})
                    continue
                given = {"out": cell.folder} | ({"init_from": before} if before else {})
                kept = [
                    o
                    for o in cell.overrides
                    if o.partition("=")[0].lstrip("+") not in (*given, "resume")
                ]
                where = [f"{key}={quoted(str(path))}" for key, path in given.items()]
                ready.append([*kept, *where, "resume=true"])
            if not ready:
                continue
            if there:
                there(ready, ended)
            else:
                launch_here(ready, places, ended, start)


def safely(report: Callable[[Path], T], otherwise: T) -> Callable[[Path], T]:
    """A report whose own failure is said and ends nothing."""

    def tried(parent: Path) -> T:
        try:
            return report(parent)
        except Exception as error:  # noqa: BLE001  the runs are worth more than their report
            say(f"warning: no report: {type(error).__name__}: {error}")
            return otherwise

    return tried
