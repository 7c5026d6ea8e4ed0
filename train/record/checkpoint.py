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
        """What is not a tensor: step, clocks, losses."""
        return read_json(self.folder / "state.json")

    def model(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return tensors_of(self.folder / "model.safetensors")

    def optimizer(self) -> dict[str, Tensor]:
        """Optimizer state by parameter name and kind."""
        return tensors_of(self.folder / "optimizer.safetensors")


def save(
    run: Path,
    step: int,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    state: dict[str, Any],
) -> None:
    """Write the checkpoint of a step. Raises OSError, leaving the earlier ones, if it cannot."""

    def write(folder: Path) -> None:
        try:
            save_file(own(model), folder / "model.safetensors")
            save_file(own(optimizer), folder / "optimizer.safetensors")
        except SafetensorError as error:  # has no errno
            raise OSError(str(error)) from error
        (folder / "state.json").write_text(json.dumps(state | {"step": step}))

    needs = sum(tensor.nbytes for tensor in (*model.values(), *optimizer.values()))
    publish(run / "checkpoints" / f"step_{step:06d}", write, needs)


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ValueError if it is none: a manifest can be forged."""
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error


def own(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}


def find(run: Path, which: str = "latest") -> tuple[Checkpoint | None, list[str]]:
    """The newest (`latest`) or best-validated (`best`) intact checkpoint, or that of a step number.

    Also returns why others were passed over. None if there is none.
    Raises ValueError if a step was named and its checkpoint is missing or damaged.
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


def sweep(run: Path) -> None:
    """Delete what a save left unfinished, or undeleted, when it was killed."""
    for folder in (run / "checkpoints").glob(f"{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest `keep` and the best."""
    folders = sorted((run / "checkpoints").glob("step_*"), key=step_of, reverse=True)
    best = min(folders, key=best_first, default=None)
    for folder in folders[keep:]:
        if folder != best:
            discard(folder)


def step_of(folder: Path) -> int:
    digits = folder.name.removeprefix("step_")
    return int(digits) if digits.isdecimal() else -1


def best_first(folder: Path) -> tuple[float, int]:
    """Orders checkpoints by validation loss, the unvalidated last, then newest first."""
    try:
        loss = read_json(folder / "state.json").get("val_loss")
    except ValueError:
        loss = None
    return (loss if isinstance(loss, float) else math.inf, -step_of(folder))
