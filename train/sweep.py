"""Many runs that end in one report: which there are, which are still to do, and how they stand."""

import hashlib
import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from train.config import (
    BEFORE,
    Config,
    arguments,
    compose,
    expand,
    fits,
    group_of,
    keys_set,
    quoted,
)
from train.match import baseline_of, compose_matched, with_baseline

if TYPE_CHECKING:  # torch and hydra take a second to import; --help and typos need none
    from train.launcher import Place

#: Keys of the sweep as a whole: its runs may not differ in them.
SHARED = "out name jobs retry report".split()

#: Keys about the sweep, where things lie, or what changes no number: they tell no run from another.
NO_IDENTITY = frozenset(
    [
        *SHARED,
        *"resume plan sweep stages baseline wandb init_from sample".split(),
        *"keep save_every log_every eval_batch_size".split(),
    ]
)
QUIET = 30.0  # seconds of a sweep before its first report; each takes a few


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of train.yaml that a sweep as a whole follows."""

    jobs: int
    retry: bool

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs={self.jobs} must be at least 1")


def settings_of(config: Config) -> Settings:
    """A config's keys of a sweep. Raises ValueError for what they cannot be."""
    return Settings(**arguments("", {key: config[key] for key in ("jobs", "retry")}, Settings)[0])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    name: str  # of its folder
    overrides: list[str]
    config: Config
    identity: str  # a hash of all that tells it from other runs
    stage: int  # 1 for the first
    parent: str | None  # the name of the stage before
    folder: Path


def cells_of(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """The overrides of every run that a command line asks for, each once; stages not yet told apart.

    They are the combinations of the values listed, times those of each line of the config's `sweep`
    key; what the command line itself sets wins over such a line.
    """
    cells = []
    for cell in expand(overrides) if multirun else [overrides]:
        own = keys_set(cell)
        named = {"experiment", "sweep"} & own  # nothing else sets it, and composing takes 0.1 s
        config = compose(cell) if named else {"sweep": None}
        if config["sweep"] is None:
            cells.append(cell)
            continue
        for line in lines_of(config, "sweep"):
            wider = expand(shlex.split(line))
            cells += [[*unless_set(more, own), *cell, "sweep=null"] for more in wider]
    if not cells:
        raise ValueError(f"{' '.join(overrides)}: no runs; a list of values is empty")
    unique = list(map(list, dict.fromkeys(map(tuple, cells))))
    return with_baseline(unique) if len(unique) > 1 else unique


def lines_of(config: Config, key: str) -> list[str]:
    """A config's lines of overrides. Raises ValueError for anything else, or none."""
    lines = config[key]
    if not fits(lines, list[str]) or not lines:
        raise ValueError(f"{key}={lines} is not a list of texts, each a line of overrides")
    return lines


def unless_set(overrides: list[str], own: set[str]) -> list[str]:
    """The overrides that the command line does not replace.

    It replaces a key that it sets itself; and if it chooses a group that these choose too, their keys
    of that group.
    """
    chosen = own & {o.partition("=")[0] for o in overrides}
    return [o for o in overrides if not {key := o.partition("=")[0], group_of(key)} & chosen]


def stages_of(cell: list[str], config: Config) -> list[list[str]]:
    """The runs that one cell stands for: itself, or one for each line of the config's `stages`."""
    if config["stages"] is None:
        return [cell]
    own = keys_set(cell)
    return [
        [*unless_set(shlex.split(line), own), *cell, "stages=null"]
        for line in lines_of(config, "stages")
    ]


def plan_cells(cells: list[list[str]], first: Config, parent: Path) -> list[Cell]:
    """Every run, checked, with its folder. Raises ValueError if any of them could not be trained.

    A run that an earlier start of this sweep knew keeps its folder, whatever is beside it now.
    """
    from train.job import check, check_start

    known = {entry["identity"]: entry["name"] for entry in manifest(parent).get("known", [])}
    taken = set(known.values())
    planned: list[Cell] = []
    for name, cell in zip(cell_names(cells), cells, strict=True):
        before: Cell | None = None
        stages = stages_of(cell, first)
        for number, overrides in enumerate(stages, 1):
            if before and "matched" in before.config:  # one width for all stages
                width = before.config["model"]["ff_dim"]
                overrides = [*overrides, "match=null", f"model.ff_dim={width}"]
            composed = compose_matched(overrides)
            for key in SHARED:
                if composed[key] != first[key]:
                    raise ValueError(
                        f"{key} is the sweep's, but its runs have {first[key]} and {composed[key]}"
                    )
            config = check(composed).config
            if before:
                check_start(before.config, config, f"stage {number}")
            elif compose(cell)["stages"] != first["stages"]:
                raise ValueError(f"stages differ between the runs of the sweep: {' '.join(cell)}")
            mine = identity(config, before.identity if before else config["init_from"])
            if mine not in known:
                known[mine] = f"{name}_stage-{number}" if len(stages) > 1 else name
                if known[mine] in taken or (parent / known[mine]).exists():
                    known[mine] += f"_{mine[:8]}"
                taken.add(known[mine])
            if mine in (other.identity for other in planned):
                before = next(other for other in planned if other.identity == mine)
                continue
            before = Cell(
                name=known[mine],
                overrides=overrides,
                config=config,
                identity=mine,
                stage=number,
                parent=before.name if before else None,
                folder=parent / known[mine],
            )
            planned.append(before)
    return sorted(planned, key=lambda cell: (cell.stage, cell.config["seed"]))  # stable


def identity(config: Config, parent: str | None) -> str:
    """A hash of all that a run's numbers follow from; `parent` says whose weights it starts from."""
    own = {
        key: value
        for key, value in config.items()
        if key not in NO_IDENTITY and (key, value) not in BEFORE.items()
    }
    own["data"] = {key: value for key, value in own["data"].items() if key != "cache"}
    own["choices"] = {key: value for key, value in own["choices"].items() if key != "experiment"}
    return hashlib.sha256(json.dumps([own, parent], sort_keys=True).encode()).hexdigest()


def cell_names(cells: list[list[str]]) -> list[str]:
    """Folder names that tell what differs between the cells of a sweep: 'attn-gqa_seed-1'."""
    shared = set.intersection(*map(set, cells))
    names = []
    for cell in cells:
        words = [re.sub(r"[^\w.]+", "-", o) for o in cell if o not in shared]
        names.append("_".join(words)[:100] or "run")
    return names


def manifest(parent: Path) -> dict[str, Any]:
    """A sweep's own record, sweep.json; empty before there is one."""
    from train.record import read_json

    path = parent / "sweep.json"
    return read_json(path) if path.exists() else {}


def sweep(
    cells: list[list[str]],
    settings: Settings,
    launcher: list[str],
    forecast: Callable[[list[tuple[str, Config]], int], None],
    report: Callable[[Path], str],
) -> int:
    """Train every cell in a process of its own and report on all; 1 if one of them failed.

    All are checked before any starts. Started again in the same folder, it skips what is done, resumes
    what was interrupted, and retries what failed if `retry`. `launcher` are the overrides that name
    another one than processes here.
    """
    from train.launcher import Stop, elsewhere
    from train.progress import say

    first = compose(cells[0])
    name = first["name"] or time.strftime("%Y%m%d-%H%M%S")
    parent = Path(str(first["out"] or Path("outputs/sweeps") / str(name)))
    planned = plan_cells(cells, first, parent)
    if launcher and settings.jobs > 1:
        raise ValueError(
            f"jobs={settings.jobs} is for runs on this machine; {launcher[0]} has keys of its own"
        )
    there = elsewhere(launcher, parent / ".hydra") if launcher else None
    parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(parent / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"{parent} is in use by another sweep") from error
    try:
        write_manifest(parent, planned, first, first["baseline"] or baseline_of(cells[0]))
        todo = [cell for cell in planned if to_do(cell, settings.retry)]
        if len(todo) < len(planned):
            say(f"{len(planned) - len(todo)} of {len(planned)} runs need nothing more")
        if todo:
            forecast([(cell.name, cell.config) for cell in todo], settings.jobs)
        run_all(planned, todo, there, settings, safely(report))
        verdict = safely(report)(parent)
    except Stop as stop:
        place = f"name={first['name']}" if first["name"] else f"out={parent}"
        say(f"interrupted; the same command with {place} goes on")
        return 128 + int(stop.args[0])
    finally:
        lock.release()
    failed = 0
    for cell in planned:
        found = state(cell.folder)
        if found["state"] != "done":
            failed += 1
            say(f"{cell.name}: {found['state']}: {found['reason']}")
    print(verdict)
    print(f"\nsweep: {parent}  ({len(planned)} runs, {failed} failed)")
    return 1 if failed else 0


def write_manifest(parent: Path, planned: list[Cell], first: Config, baseline: str) -> None:
    """Write sweep.json: what was asked for last, and every run that the folder has ever known."""
    from train.record import write_json

    told = ("name", "identity", "overrides", "stage", "parent", "config")
    cells = [{key: getattr(cell, key) for key in told} for cell in planned]
    now = {cell.identity for cell in planned}
    others = [e for e in manifest(parent).get("known", []) if e["identity"] not in now]
    content = {
        "command": sys.argv,
        "title": first["report"]["title"] or parent.name,
        "figure": first["report"]["figure"],
        "baseline": baseline,
        "cells": cells,
        "known": others + [{"identity": cell.identity, "name": cell.name} for cell in planned],
    }
    write_json(parent / "sweep.json", content)


def to_do(cell: Cell, retry: bool) -> bool:
    """Whether a run is still to be trained: neither done, nor failed once unless `retry`."""
    return state(cell.folder)["state"] not in ("done", *(() if retry else ("failed",)))


def state(folder: Path) -> dict[str, Any]:
    """How a run stands: state, reason and last step, from its status.json."""
    from train.launcher import status_of

    return status_of(folder) or {"state": "waiting", "reason": None, "last_step": None}


def run_all(
    planned: list[Cell],
    todo: list[Cell],
    there: "Place | None",
    settings: Settings,
    report: Callable[[Path], str],
) -> None:
    """Run what is to do, stage by stage, seed by seed, and show how all stands."""
    from train.launcher import launch_here
    from train.progress import say
    from train.record import write_json
    from train.watch import Board, Watched

    parent = planned[0].folder.parent
    if settings.jobs > 1 and todo:
        say(f"jobs={settings.jobs}: runs share the machine, so their times are not comparable")
    runs = [Watched(cell.name, cell.folder, cell.config["steps"]) for cell in planned]
    due = time.monotonic() + QUIET
    with Board(runs) as board:

        def ended(folder: Path) -> None:
            nonlocal due
            board.ended(folder)
            start = time.monotonic()
            if start >= due:  # reports take a tenth of the time at most
                report(parent)  # before the next run is on the clock
                due = time.monotonic() + 10 * (time.monotonic() - start)

        for stage in sorted({cell.stage for cell in todo}):
            ready = []
            for cell in (cell for cell in todo if cell.stage == stage):
                before = parent / cell.parent if cell.parent else None
                if before and state(before)["state"] != "done":
                    cell.folder.mkdir(exist_ok=True)
                    why = {"state": "waiting", "reason": f"{cell.parent} did not end well"}
                    write_json(cell.folder / "status.json", why | {"last_step": None})
                    continue
                places = {"out": cell.folder} | ({"init_from": before} if before else {})
                kept = [
                    o
                    for o in cell.overrides
                    if o.partition("=")[0].lstrip("+") not in (*places, "resume")
                ]
                where = [f"{key}={quoted(str(path))}" for key, path in places.items()]
                ready.append([*kept, *where, "resume=true"])
            if not ready:
                continue
            if there:
                there(ready, ended)
            else:
                launch_here(ready, settings.jobs, ended)


def safely(report: Callable[[Path], str]) -> Callable[[Path], str]:
    """A report whose own failure is said and ends nothing."""

    def tried(parent: Path) -> str:
        from train.progress import say

        try:
            return report(parent)
        except Exception as error:  # noqa: BLE001  the runs are worth more than their report
            say(f"warning: no report: {type(error).__name__}: {error}")
            return ""

    return tried
