"""The runs of a sweep, checked: their identities and folders."""

import functools
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import read_json
from data.corpus import Source
from train.config.compose import compose
from train.config.keys import IDENTITY, SHARED, origin_of, select
from train.config.old_spellings import modernise
from train.config.schema import Config
from train.measure.device import select_device
from train.record.run_folder import load_manifest, refuse_other_text
from train.record.terminal import say
from train.setup.build import build_source
from train.setup.match import compose_matched
from train.setup.run_setup import check, check_start
from train.sweep.expand import cell_names, stages_of


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


#: Keys that a device may refuse, and values that none does.
ANY_DEVICE = {
    "device": "cpu", "dtype": "auto", "compile": False, "kernel": "auto", "force": True,
}  # fmt: skip


def plan_cells(
    cells: list[list[str]], first: Config, parent: Path, *, here: bool = True
) -> list[Cell]:
    """Every run, checked, with its folder. Raises ValueError if any of them could not be trained.

    What depends on the device is not checked for runs that will not be `here`. A run that an earlier
    start of this sweep knew keeps its folder, whatever is beside it now.
    """
    each = (stage for cell in cells for stage in stages_of(cell, first))
    kernel = common_kernel(map(compose, each)) if here else None
    if kernel:
        say(
            f"kernel={kernel}: the fastest that the runs can all train with; kernel=fastest: each its own"
        )
    checks, names = Checks(here), Names(parent)
    planned: dict[str, Cell] = {}  # by identity
    for name, cell in zip(cell_names(cells), cells, strict=True):
        if compose(cell)["stages"] != first["stages"]:
            raise ValueError(f"stages differ between the runs of the sweep: {' '.join(cell)}")
        stages, before = stages_of(cell, first), None
        for number, asked in enumerate(stages, 1):
            overrides, composed = completed(asked, before, kernel)
            refuse_unshared(composed, first)
            config = checks.of(composed)
            if before:
                check_start(before.config, config, f"stage {number}")
            mine = identity(config, before.identity if before else origin_of(config))
            if mine not in planned:
                own = names.of(mine, f"{name}_stage-{number}" if len(stages) > 1 else name)
                planned[mine] = Cell(
                    name=own,
                    overrides=overrides,
                    config=config,
                    identity=mine,
                    stage=number,
                    parent=before.name if before else None,
                    folder=parent / own,
                )
            before = planned[mine]
    return sorted(planned.values(), key=lambda cell: (cell.stage, cell.config["seed"]))  # stable


def refuse_changed_text(planned: Iterable[Cell]) -> None:
    """Raise ValueError for a run that has begun with other text than its config names now."""
    sources: dict[str, Source] = {}
    for cell in planned:
        if (cell.folder / "environment.json").exists():
            data = cell.config["data"]
            key = json.dumps(data, sort_keys=True)
            sources[key] = sources.get(key) or build_source(data)[0]
            refuse_other_text(cell.folder, sources[key])


def completed(
    overrides: list[str], before: Cell | None, kernel: str | None
) -> tuple[list[str], Config]:
    """A run's overrides and config, with the width of the stage before and the kernel of all runs."""
    if before and "matched" in before.config:  # one width for all stages
        width = before.config["model"]["ff_dim"]
        overrides = [*overrides, "match=null", f"model.ff_dim={width}"]
    composed = compose_matched(overrides)
    if kernel and composed["kernel"] == "auto" and trains_with(composed, kernel):
        return [*overrides, f"kernel={kernel}"], composed | {"kernel": kernel}
    return overrides, composed


def refuse_unshared(composed: Config, first: Config) -> None:
    """Raise ValueError for a run that sets a key of the sweep otherwise than the first one does."""
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


class Checks:
    """Checked configs of runs; those that differ in their seed alone are checked once."""

    def __init__(self, here: bool) -> None:
        self.here = here
        self.found: dict[str, Config] = {}

    def of(self, composed: Config) -> Config:
        """The config of a run as it will be trained. Raises ValueError if it cannot be."""
        seed = composed["seed"]
        other_seed = {"seed": 0} if type(seed) is int and seed >= 0 else {}
        alike = json.dumps(composed | other_seed, sort_keys=True)
        if alike not in self.found:
            there = {} if self.here else {key: composed[key] for key in ANY_DEVICE}
            config = composed if self.here else composed | ANY_DEVICE
            self.found[alike] = check(config).config | there
        return self.found[alike] | ({"seed": seed} if other_seed else {})


class Names:
    """The names of runs by identity: a run that the folder knows keeps its own."""

    def __init__(self, parent: Path) -> None:
        self.parent, self.known = parent, identities(known_runs(parent))
        self.taken = set(self.known.values())

    def of(self, mine: str, wished: str) -> str:
        """The name of a run: as wished, if no other one has it."""
        if mine not in self.known:
            free = wished not in self.taken and not (self.parent / wished).exists()
            self.known[mine] = wished if free else f"{wished}_{mine[:8]}"
            self.taken.add(self.known[mine])
        return self.known[mine]


def common_kernel(configs: Iterable[Config]) -> str | None:
    """The fastest attention kernel that all of these runs on CUDA can train with; None elsewhere.

    Of those that ask for none. Times of runs would otherwise compare kernels: flash takes no bias. Runs
    that no kernel of torch's can do are left out.
    """
    asking = {
        json.dumps(config | {"seed": 0}, sort_keys=True): config
        for config in configs
        if config["kernel"] == "auto"
        and select_device(config["device"], config["dtype"]).name == "cuda"
    }
    able = {
        kernel: {name for name, config in asking.items() if trains_with(config, kernel)}
        for kernel in (("flash", "efficient", "math") if asking else ())
    }
    some = set[str]().union(*able.values())
    return next((kernel for kernel, runs in able.items() if runs and runs == some), None)


def trains_with(config: Config, kernel: str) -> bool:
    """Whether a run can train with this attention kernel."""
    try:
        check(config | {"kernel": kernel})
    except ValueError:
        return False
    return True


def identity(config: Config, parent: str | None) -> str:
    """A hash of all that a run's numbers follow from; `parent` says whose weights it starts from."""
    own = select(config | {"init_from": parent}, IDENTITY)
    return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()


def known_runs(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of sweep.json by name: every run that a sweep's folder has ever known.

    Earlier versions wrote the configs of the runs last asked for alone; those of the others are in
    their folders.
    """
    written = load_manifest(folder)
    entries = {}
    for entry in [*written.get("known", []), *written.get("cells", [])]:
        run = folder / entry["name"]
        if "config" not in entry and (run / "config.json").exists():
            config = read_json(run / "config.json")
            origin = Path(origin_of(config) or "")
            parent = origin.name if origin.parent == folder.resolve() else None
            entry = {"name": entry["name"], "config": config, "parent": parent}
        if "config" in entry:
            entries[entry["name"]] = entry
    return entries


def identities(entries: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The names of known runs by identity, which follows from their configs in today's spelling."""

    @functools.cache
    def identity_of(name: str) -> str:
        config, before = modernise(entries[name]["config"]), entries[name]["parent"]
        return identity(config, identity_of(before) if before in entries else origin_of(config))

    return {identity_of(name): name for name in entries}
