"""A run on disk: where new ones go, and how finished ones are opened again."""

import itertools
import re
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data import tokenizer as tokenizers
from model.transformer import Transformer
from train.build import build_model
from train.checkpoint import Checkpoint, find
from train.config import BEFORE, Config
from train.huggingface import is_theirs
from train.record import read_json


def fresh_folder(config: Config) -> Path:
    """A run folder that nobody else has, made at once so that two starts cannot share it."""
    choices = config["choices"]
    words = [config["name"], choices["attn"], choices["pos"], f"seed{config['seed']}"]
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{'-'.join(filter(None, words))}"
    for attempt in itertools.count(1):
        folder = Path("outputs/runs") / (name if attempt == 1 else f"{name}-{attempt}")
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise AssertionError("unreachable")


def state_of(folder: Path) -> str | None:
    """The state of the run in a folder; None if there is no run.

    Raises ValueError if the folder holds something else.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"out={folder} is a file, not a folder")
    if (folder / "config.json").exists() and not is_theirs(folder):
        status = folder / "status.json"
        return str(read_json(status).get("state")) if status.exists() else "interrupted"
    # What a start that was killed may leave before there is a config:
    beginning = {"environment.json", "tokenizer.json", "metrics.jsonl", "status.json"}
    if any(p.name not in beginning and not p.name.startswith(".") for p in folder.iterdir()):
        raise ValueError(f"out={folder} holds other files; choose a new or empty folder")
    return None


def open_config(folder: Path) -> Config:
    """The config of a run, complete whatever version wrote it. Raises ValueError if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no config.json")
    if is_theirs(folder):
        raise ValueError(f"{folder} is not a run but a folder of transformers; init_from takes it")
    config = BEFORE | read_json(folder / "config.json")
    choices = config.get("choices")
    if not isinstance(choices, dict) or not {"attn", "pos", "model"} <= choices.keys():
        raise ValueError(f"{folder / 'config.json'} is not the config of a run: it has no choices")
    for group, name in choices.items():
        if not re.fullmatch(r"[\w./-]+", str(name)):
            raise ValueError(f"{folder / 'config.json'}: choices.{group}={name!r} is no name")
    return config


def open_tokenizer(folder: Path) -> Tokenizer:
    return tokenizers.from_file(folder / "tokenizer.json")


def open_checkpoint(folder: Path, which: str = "latest") -> Checkpoint:
    """A checkpoint of a run. Raises ValueError if no intact one is there."""
    checkpoint, problems = find(folder, which)
    if checkpoint is None:
        raise ValueError("; ".join(problems) or f"{folder} has no checkpoint")
    return checkpoint


def open_model(folder: Path, config: Config, tokenizer: Tokenizer) -> Transformer:
    """The model of a run's config, uninitialised, on torch's default device.

    Raises ValueError for a config of something else.
    """
    try:
        return build_model(config, tokenizer.get_vocab_size())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a run: {error}") from error


def load(model: Transformer, weights: dict[str, Any], where: str) -> None:
    """Copy weights into a model by name. Raises ValueError unless names and shapes are the same."""
    check_fit(model, weights, where)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])


def check_fit(model: Transformer, weights: dict[str, Any], where: str) -> None:
    """Raise ValueError unless weights have the names and shapes of a model's parameters."""
    mine = dict(model.named_parameters())
    for name in sorted(mine.keys() | weights.keys()):
        if name not in mine or name not in weights:
            raise ValueError(
                f"{where}: {name} is {'not of this model' if name in weights else 'missing'}"
            )
        there, here = tuple(weights[name].shape), tuple(mine[name].shape)
        if there != here:
            raise ValueError(f"{where}: {name} is {there} there, {here} here")
