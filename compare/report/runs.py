"""Finished runs, read from their folders."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import read_json_or
from train.config.old_spellings import modernise
from train.config.schema import Config
from train.record.run_folder import is_hf_folder, load_manifest, load_summary
from train.record.run_log import records

Curve = list[tuple[int, float]]  # (step, loss)


@dataclass(eq=False)
class Run:
    """The record of one run; what is missing from its folder is empty."""

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
        """True unless it waits or is running; also if it waits for a stage that has ended badly."""
        state, before = self.status.get("state"), self.parent
        if state == "waiting" and before is not None and before.over:
            return not before.done
        return self.done or state not in ("waiting", "running")

    @property
    def reason(self) -> str | None:
        """Why it has no result, in one line: that of the first stage that ended badly."""
        first = next((run for run in self.stages if run.over and not run.done), self)
        why = first.status.get("reason")
        return None if why is None else " ".join(str(why).split())

    @property
    def seed(self) -> int:
        return int(self.summary.get("seed") or self.config.get("seed") or 0)

    @property
    def tokens(self) -> int:
        """Training tokens of all stages."""
        return sum(stage.get("tokens") or 0 for stage in self.stages)

    @property
    def stages(self) -> "list[Run]":
        """The runs that its weights came from, the first one first, and itself."""
        return [*(self.parent.stages if self.parent else []), self]

    def history(self, split: str) -> Curve:
        """Losses of all stages by step, counted from the start of the first."""
        curve: Curve = []
        done = 0
        for stage in self.stages:
            losses = stage.train if split == "train" else stage.val
            curve += [(done + step, loss) for step, loss in losses if step or not done]
            done += stage.summary.get("steps") or (stage.train[-1][0] if stage.train else 0)
        return curve

    def get(self, key: str) -> Any:
        """A number of the summary, None if it has none; of training time, that of all stages."""
        if key == "train_seconds":
            seconds: list[Any] = [stage.summary.get(key) for stage in self.stages]
            return None if None in seconds else math.fsum(seconds)
        return self.summary.get(key)

    def answer(self, kind: str) -> dict[str, Any]:
        """The result of eval.py for a kind of evaluation; empty without one."""
        return read_json_or(self.folder / "eval" / f"{kind}.json", {})


def read(folders: Sequence[Path]) -> list[Run]:
    """The runs in these folders, each a run, a sweep, or a folder that contains some.

    A run that another one continues is a stage of that one, unless its folder is given.
    Raises ValueError if there are none.
    """
    cells = {cell[0].resolve(): cell for folder in folders for cell in cells_in(folder)}
    if not cells:
        raise ValueError(
            f"{', '.join(map(str, folders))}: no run there (a folder with config.json)"
        )
    runs = {path: open_run(folder, config) for path, (folder, config, _) in cells.items()}
    given = {folder.resolve() for folder in folders}
    for path, run in runs.items():
        origin = cells[path][2] or run.config.get("init_from")
        before = Path(origin).resolve() if origin else None
        if before and before != path and before not in given:
            run.parent = runs.get(before)
    continued = {run.parent for run in runs.values()}
    return [run for run in runs.values() if run not in continued]


def cells_in(folder: Path) -> Iterator[tuple[Path, Config, Path | None]]:
    """The runs under a folder: folder, config in sweep.json, and folder of the previous stage.

    Of a sweep, the runs of its last command, in its order.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if sweep := load_manifest(folder):
        for cell in sweep["cells"]:
            parent = cell["parent"] and folder / cell["parent"]
            yield folder / cell["name"], cell.get("config", {}), parent
    elif is_hf_folder(folder):
        return
    elif any((folder / name).exists() for name in ("config.json", "summary.json", "status.json")):
        yield folder, {}, None
    else:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
            yield from cells_in(inner)


def open_run(folder: Path, planned: Config) -> Run:
    """Read the folder of a run; without a config.json, its config is the `planned` one."""

    saved = read_json_or(folder / "config.json", planned)
    config = modernise(saved) if saved else {}
    origin = config.get("init_from")
    lines = list(records(folder / "metrics.jsonl"))
    text = folder / "sample.txt"
    summary = read_json_or(folder / "summary.json", {})
    state = {"state": "done" if summary else "waiting", "reason": None}
    return Run(
        folder=folder,
        config=config,
        summary=summary,
        status=read_json_or(folder / "status.json", state),
        environment=read_json_or(folder / "environment.json", {}),
        train=curve(lines, "train"),
        val=curve(lines, "val"),
        sample=text.read_text(encoding="utf-8") if text.exists() else "",
        origin_loss=(load_summary(Path(origin)) or {}).get("val_loss") if origin else None,
    )


def curve(lines: list[dict[str, Any]], split: str) -> Curve:
    """The finite losses of a split, by step."""
    losses = ((line["step"], line["loss"]) for line in lines if line["split"] == split)
    return [(step, loss) for step, loss in losses if math.isfinite(loss)]
