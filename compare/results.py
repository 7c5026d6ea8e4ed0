"""Finished and failed runs, read from their folders and sorted into variants."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.config import BEFORE, Config
from train.huggingface import is_theirs
from train.record import read_json, records

Curve = list[tuple[int, float]]  # (step, loss)

#: Keys of a config that tell no variant from another.
NO_FACTOR = frozenset(
    "out name seed resume plan sweep stages jobs retry baseline match matched report wandb sample "
    "init_from keep save_every log_every eval_every eval_batch_size".split()
)


#: Groups whose choices need no "key=" to be understood.
BARE = ("attn", "pos", "model", "data", "optim")


@dataclass(eq=False)
class Run:
    """One run's record; whatever is missing from its folder is empty."""

    folder: Path
    config: Config
    summary: dict[str, Any]
    status: dict[str, Any]
    environment: dict[str, Any]
    train: Curve
    val: Curve
    sample: str
    parent: "Run | None" = None  # the stage before, if it is among the runs read
    origin_loss: float | None = None  # the validation loss of the run that gave the weights

    @property
    def done(self) -> bool:
        return bool(self.summary) and self.status.get("state", "done") == "done"

    @property
    def over(self) -> bool:
        """Whether nothing more is to be expected of it."""
        return self.done or self.status.get("state") not in ("waiting", "running")

    @property
    def seed(self) -> int:
        return int(self.summary.get("seed") or self.config.get("seed") or 0)

    @property
    def stages(self) -> "list[Run]":
        """Itself and the runs that its weights came from, the first one first."""
        return [*(self.parent.stages if self.parent else []), self]

    def history(self, split: str) -> Curve:
        """The losses of all stages as one curve, steps counted from the first."""
        curve: Curve = []
        done = 0
        for stage in self.stages:
            own = stage.train if split == "train" else stage.val
            curve += [(done + step, loss) for step, loss in own if step or not done]
            done += stage.summary.get("steps") or (stage.train[-1][0] if stage.train else 0)
        return curve

    def get(self, key: str) -> Any:
        """A number of the summary; None if it has none."""
        return self.summary.get(key)

    def answer(self, kind: str) -> dict[str, Any]:
        """What eval.py measured of it: length, decode or attention; empty if it was not asked."""
        path = self.folder / "eval" / f"{kind}.json"
        return read_json(path) if path.exists() else {}


@dataclass(eq=False)
class Variant:
    """Runs that differ in their seed alone."""

    factors: dict[str, Any]  # what tells it from the other variants: {"attn": "gqa", "pos": "rope"}
    runs: list[Run] = field(default_factory=list)

    @property
    def label(self) -> str:
        """'gqa rope', 'gqa n_kv_heads=1'."""
        parts = [
            str(v) if key in BARE else f"{key.partition('.')[2] or key}={plain(v)}"
            for key, v in self.factors.items()
            if v is not None
        ]
        return " ".join(parts) or "the variant"

    @property
    def seeds(self) -> dict[int, Run]:
        """Its finished runs by seed; of two with the same seed the later one."""
        return {run.seed: run for run in self.runs if run.done}

    @property
    def done(self) -> list[Run]:
        """Its finished runs, one a seed."""
        return list(self.seeds.values())

    def values(self, key: str) -> list[float]:
        """A number of the summaries of its finished runs, where they have it."""
        found = (run.get(key) for run in self.done)
        return [v for v in found if isinstance(v, int | float) and math.isfinite(v)]

    def mean(self, key: str) -> float | None:
        return statistics.fmean(self.values(key)) if self.values(key) else None

    def median(self, key: str) -> float | None:
        return statistics.median(self.values(key)) if self.values(key) else None

    def first(self, key: str) -> Any:
        """What its finished runs share: the first one's."""
        return self.done[0].get(key) if self.done else None


def plain(value: Any) -> str:
    """A config value for people: 0.003, [local,global]."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders: a run, a sweep, or anything that holds such.

    A run that others continue is their stage before, and no run of its own.
    Raises ValueError if there are none.
    """
    found = [cell for folder in folders for cell in cells_in(folder)]
    cells = {folder.resolve(): (folder, config, parent) for folder, config, parent in found}
    if not cells:
        raise ValueError(
            f"{', '.join(map(str, folders))}: no run there (a folder with config.json)"
        )
    runs = {path: open_run(folder, config) for path, (folder, config, _) in cells.items()}
    named = {folder.resolve() for folder in folders}
    for path, run in runs.items():
        origin = cells[path][2] or run.config.get("init_from")
        before = Path(origin).resolve() if origin else None
        if before and before != path and before not in named:
            run.parent = runs.get(before)
    continued = {id(run.parent) for run in runs.values()}
    return [run for run in runs.values() if id(run) not in continued]


def cells_in(folder: Path) -> Iterator[tuple[Path, Config, Path | None]]:
    """The runs under a folder: where, the config asked for, and the stage before if it is known.

    Those of a sweep come in its order, and are those alone that it was last asked for.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if (folder / "sweep.json").exists():
        for cell in read_json(folder / "sweep.json")["cells"]:
            parent = cell["parent"] and folder / cell["parent"]
            yield folder / cell["name"], cell.get("config", {}), parent
    elif is_theirs(folder):
        return
    elif any((folder / name).exists() for name in ("config.json", "summary.json", "status.json")):
        yield folder, {}, None
    else:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from cells_in(inner)


def open_run(folder: Path, asked: Config) -> Run:
    """What a run's folder holds. A run that left no config has the one that was `asked` for."""

    def read_or(name: str, other: dict[str, Any]) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else other

    config = BEFORE | read_or("config.json", asked)
    lines = list(records(folder / "metrics.jsonl"))
    text = folder / "sample.txt"
    summary = read_or("summary.json", {})
    return Run(
        folder=folder,
        config=config,
        summary=summary,
        status=read_or("status.json", {"state": "done" if summary else "waiting", "reason": None}),
        environment=read_or("environment.json", {}),
        train=curve(lines, "train"),
        val=curve(lines, "val"),
        sample=text.read_text(encoding="utf-8") if text.exists() else "",
        origin_loss=loss_of(config.get("init_from")),
    )


def curve(lines: list[dict[str, Any]], split: str) -> Curve:
    """The finite losses of a split, by step."""
    found = ((line["step"], line["loss"]) for line in lines if line["split"] == split)
    return [(step, loss) for step, loss in found if math.isfinite(loss)]


def loss_of(origin: str | None) -> float | None:
    """The validation loss that a run ended with, if it is still there."""
    path = Path(origin) / "summary.json" if origin else None
    return read_json(path).get("val_loss") if path and path.exists() else None


def settings_of(run: Run) -> dict[str, Any]:
    """All that may tell a run's variant from another's, flat: attn, pos, attn.n_kv_heads, steps, ..."""
    config = {key: value for key, value in run.config.items() if key not in NO_FACTOR}
    choices = dict(config.pop("choices", {}))
    choices |= {key: run.summary[key] for key in ("attn", "pos", "model") if key in run.summary}
    choices.pop("experiment", None)
    flat = dict(flatten({key: v for key, v in config.items() if not isinstance(v, dict)}))
    for group in ("attn", "pos", "model", "data", "optim"):
        flat |= flatten(config.get(group, {}), f"{group}.")
    flat["stages"] = len(run.stages)
    flat["weights"] = "given" if run.stages[0].config.get("init_from") else "fresh"
    flat = {
        key: value for key, value in flat.items() if not key.endswith(("_target_", "data.cache"))
    }
    return {key: choices[key] for key in ("attn", "pos", *sorted(choices)) if key in choices} | flat


def flatten(node: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def variants_of(runs: Sequence[Run]) -> tuple[list[Variant], list[str]]:
    """Runs grouped by what differs between them beside the seed, in their order.

    A key that follows from those before it (the KV heads of mha and mqa) tells nothing new and is left
    out; second, the keys among these that belong to another group than they follow from.
    """
    settings = [settings_of(run) for run in runs if run.config]
    keys = list(dict.fromkeys(key for s in settings for key in s))
    factors: list[str] = []
    confounded: list[str] = []
    for key in keys:
        if len({plain(s.get(key)) for s in settings}) < 2:
            continue
        if adds(key, factors, settings):
            factors.append(key)
        elif key.partition(".")[0] not in factors and not matched_width(key, runs):
            confounded.append(key)
    grouped: dict[tuple[str, ...], Variant] = {}
    for run in runs:
        own = settings_of(run) if run.config else {"run": run.folder.name}
        mine = {key: own.get(key) for key in (factors if run.config else ["run"])}
        grouped.setdefault(tuple(map(plain, mine.values())), Variant(mine)).runs.append(run)
    found = list(grouped.values())
    if not factors and found and runs[0].config:
        own = settings_of(runs[0])
        found[0].factors = {key: own.get(key) for key in ("attn", "pos")}
    return found, confounded


def adds(key: str, factors: list[str], settings: list[dict[str, Any]]) -> bool:
    """Whether a key differs between runs that are alike in all of these factors."""
    seen: dict[tuple[str, ...], str] = {}
    for s in settings:
        cell = tuple(plain(s.get(factor)) for factor in factors)
        if seen.setdefault(cell, plain(s.get(key))) != plain(s.get(key)):
            return True
    return False


def matched_width(key: str, runs: Sequence[Run]) -> bool:
    """Whether a key is the feed-forward's width, differing because `match` made it so."""
    stages = (stage for run in runs for stage in run.stages)
    return key == "model.ff_dim" and any(stage.config.get("matched") for stage in stages)


def is_baseline(variant: Variant, wanted: dict[str, Any]) -> bool:
    """Whether a variant has all settings of a baseline, as {"attn": "mha", "attn.n_kv_heads": 2}."""
    own = settings_of(variant.runs[0])
    return all(plain(own.get(key)) == plain(value) for key, value in wanted.items())


def pairs(
    variants: Sequence[Variant], factor: str, level: str, base: str
) -> list[tuple[Variant, Variant]]:
    """Variants at a level of a factor, each with the one at `base` that differs in this alone."""
    others = [
        {k: plain(v) for k, v in variant.factors.items() if k != factor} for variant in variants
    ]
    return [
        (one, two)
        for (one, rest), (two, same) in itertools.product(
            zip(variants, others, strict=True), repeat=2
        )
        if rest == same
        and plain(one.factors.get(factor)) == level
        and plain(two.factors.get(factor)) == base
    ]
