"""Checkpoints: complete, verified folders `checkpoints/step_NNNNNN`, newest and best found by scan."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.atomic import TEMPORARY, discard, publish, read_json, verify


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk."""

    folder: Path
    step: int

    @property
    def state(self) -> dict[str, Any]:
        """Everything but tensors: step, timers, losses."""
        return read_json(self.folder / "state.json")

    def model(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return load_tensors(self.folder / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """Optimizer state by parameter name and kind."""
        return load_tensors(self.folder / "optimizer.safetensors")


def save(
    run: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Write the checkpoint of a step: model by parameter name, optimizer by `name/kind`.

    Raises OSError, leaving earlier checkpoints intact, if it cannot.
    """

    def write(folder: Path) -> None:
        try:
            for name, tensors in (("model", model), ("optimizer", optimizer)):
                whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
                save_file(whole, folder / f"{name}.safetensors")
        except SafetensorError as error:  # has no errno
            raise OSError(str(error)) from error
        (folder / "state.json").write_text(json.dumps(state | {"step": step}))

    needs = sum(tensor.nbytes for tensor in (*model.values(), *optimizer.values()))
    publish(run / "checkpoints" / f"step_{step:06d}", write, needs)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError if it is not one: manifests can be forged."""
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def find(run: Path, which: str = "latest") -> tuple[Checkpoint | None, list[str]]:
    """The newest (`latest`) or best-validated (`best`) intact checkpoint, or that of a step number.

    Returns None if there is none; also returns why damaged checkpoints were skipped.
    Raises ValueError if the checkpoint of a named step is missing or damaged.
    """
    folders = sorted((run / "checkpoints").glob("step_*"), key=step_of, reverse=True)
    if which == "best":
        folders.sort(key=best_first)
    elif which != "latest":
        folders = [run / "checkpoints" / f"step_{int(which):06d}"] if which.isdecimal() else []
        if not folders:
            raise ValueError(f"checkpoint={which} is not latest, best or a step")
        verify(folders[0])
    problems = []
    for folder in folders:
        try:
            verify(folder)
        except ValueError as error:
            problems.append(str(error))
        else:
            return Checkpoint(folder, step_of(folder)), problems
    return None, problems


def remove_unfinished(run: Path) -> None:
    """Delete the temporary folders of interrupted saves and deletions."""
    for folder in (run / "checkpoints").glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints except the newest `keep` and the best."""
    folders = sorted((run / "checkpoints").glob("step_*"), key=step_of, reverse=True)
    best = min(folders, key=best_first, default=None)
    for folder in folders[keep:]:
        if folder != best:
            discard(folder)


def step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def best_first(folder: Path) -> tuple[float, int]:
    """Sort key: by validation loss, checkpoints without a finite one last, then newest first."""
    try:
        loss = read_json(folder / "state.json").get("val_loss")
    except ValueError:
        loss = None
    loss = loss if isinstance(loss, float) and math.isfinite(loss) else math.inf
    return (loss, -step_of(folder))
