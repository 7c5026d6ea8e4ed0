"""The question that is asked: two variants that train, whose runs share a folder."""

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from train.config.compose import compose, keys_set, quoted
from train.config.keys import origin_of
from train.config.old_spellings import current_overrides, modernise
from train.config.options import SweepOptions
from train.config.schema import Config
from train.record.run_folder import load_manifest
from train.setup.match import with_baseline
from train.sweep.apart import apart
from train.sweep.expand import settings_of
from train.sweep.plan import identity, plan_cells
from train.sweep.slots import visible_gpus

#: Keys that the judge sets itself, or that make more than one run.
OWN = {"seed", "seeds", "out", "name", "plan", "resume", "minutes", "sweep", "stages"}


@dataclass(frozen=True)
class Question:
    """Is `new` better than `base`? Both are overrides."""

    base: list[str]
    new: list[str]
    runs: Path  # the folder of the runs

    def cells(self, seeds: int) -> list[list[str]]:
        """The overrides of the runs of both with so many seeds, the base's first."""
        out = f"out={quoted(str(self.runs))}"
        pairs = [[*own, f"seed={i}", out] for i in range(seeds) for own in (self.base, self.new)]
        return with_baseline(pairs)

    @cached_property
    def first(self) -> Config:
        """The config of the base."""
        return compose(self.cells(1)[0])

    @cached_property
    def settings(self) -> SweepOptions:
        return settings_of(self.first)

    @cached_property
    def names(self) -> tuple[str, str]:
        """The identities of base and new but for the seed.

        Raises ValueError if one cannot be trained here, or if both are the same.
        """
        with apart(bool(visible_gpus(self.first["device"]))) as ask:
            planned = ask(plan_cells, self.cells(1), self.first, self.runs)
        if len(planned) < 2:
            raise ValueError(f"base and new are the same variant: {' '.join(self.new)}")
        base, new = (variant(cell.config) for cell in planned)
        return base, new

    def folders(self) -> tuple[dict[int, Path], dict[int, Path]]:
        """The folders of the runs last asked for, by seed: those of the base, and of the new."""
        found: dict[str, dict[int, Path]] = {name: {} for name in self.names}
        for entry in load_manifest(self.runs)["cells"]:
            own = found[variant(entry["config"])]
            own[entry["config"]["seed"]] = self.runs / entry["name"]
        return found[self.names[0]], found[self.names[1]]


def variant(config: Config) -> str:
    """What the runs of a variant have in common: a hash of all but the seed."""
    config = modernise(config)
    return identity(config | {"seed": 0}, origin_of(config))[:16]


def ask(base: str, new: str, both: list[str], folder: Path) -> Question:
    """A question in words, each as after `train.py`. Raises ValueError for what is not one run each."""
    variants: dict[str, list[str]] = {}
    for key, text in (("base", base), ("new", new)):
        overrides = current_overrides("train", [*both, *shlex.split(text)])
        if taken := OWN & keys_set(overrides):
            raise ValueError(f"{key}: {min(taken)} is not for a variant; the judge chooses it")
        config = compose(overrides)
        several = config["sweep"] or config["stages"] or config["report"]["evaluate"]
        if several:
            raise ValueError(
                f"{key}={text}: a variant is one run, without sweep, stages, evaluations"
            )
        if config["steps"] == 0:
            raise ValueError(f"{key}: steps=0 trains nothing that could be judged")
        variants[key] = overrides
    asked = Question(**variants, runs=folder / "runs")
    settings_of(asked.first)
    return asked
