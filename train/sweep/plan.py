"""The runs of a sweep, checked: their identities and folders."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import read_json
from train.config.compose import compose
from train.config.old_spellings import MISSING
from train.config.schema import Config
from train.setup.match import compose_matched
from train.setup.run_setup import check, check_start
from train.sweep.expand import cell_names, stages_of

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


def plan_cells(cells: list[list[str]], first: Config, parent: Path) -> list[Cell]:
    """Every run, checked, with its folder. Raises ValueError if any of them could not be trained.

    A run that an earlier start of this sweep knew keeps its folder, whatever is beside it now.
    """
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
            if composed["minutes"] is not None:
                raise ValueError(
                    f"minutes={composed['minutes']} is for one run; those of a sweep have equal "
                    "steps: give steps=N"
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
        if key not in NO_IDENTITY and (key, value) not in MISSING.items()
    }
    own["data"] = {key: value for key, value in own["data"].items() if key != "cache"}
    own["choices"] = {key: value for key, value in own["choices"].items() if key != "experiment"}
    return hashlib.sha256(json.dumps([own, parent], sort_keys=True).encode()).hexdigest()


def manifest(parent: Path) -> dict[str, Any]:
    """A sweep's own record, sweep.json; empty before there is one."""
    path = parent / "sweep.json"
    return read_json(path) if path.exists() else {}
