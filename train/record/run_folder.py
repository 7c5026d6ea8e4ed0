"""Folders of runs: making new ones and opening existing ones."""

import re
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from data import tokenizer as tokenizers
from data.atomic import read_json, read_json_or
from data.corpus import Source
from train.config.old_spellings import modernise
from train.config.schema import Config
from train.record.checkpoint import Checkpoint, find


def is_hf_folder(folder: Path) -> bool:
    """True for a folder of Hugging Face transformers: its config.json has a `model_type`."""
    path = folder / "config.json"
    return path.is_file() and "model_type" in read_json(path)


def new_run_folder(config: Config) -> Path:
    """A new folder under outputs/runs; created here, so that two processes cannot share it."""
    choices = config["choices"]
    words = [config["name"], choices["attn"], choices["pos"], f"seed{config['seed']}"]
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{'-'.join(filter(None, words))}"
    folder, attempt = Path("outputs/runs") / name, 1
    folder.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder.mkdir()
        except FileExistsError:
            attempt += 1
            folder = folder.with_name(f"{name}-{attempt}")
        else:
            return folder


def state_of(folder: Path) -> str | None:
    """State of the run in a folder; None if there is no run.

    Raises ValueError if the folder holds something else.
    """
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise ValueError(f"out={folder} is a file, not a folder")
    if (folder / "config.json").exists() and not is_hf_folder(folder):
        status = folder / "status.json"
        return str(read_json(status).get("state")) if status.exists() else "interrupted"
    # Files that a run may leave if it is killed before it has written its config:
    first_files = {"environment.json", "tokenizer.json", "metrics.jsonl", "status.json"}
    if any(p.name not in first_files and not p.name.startswith(".") for p in folder.iterdir()):
        raise ValueError(f"out={folder} holds other files; choose a new or an empty folder")
    return None


def open_config(folder: Path) -> Config:
    """The config of a run, with keys that its version lacked. Raises ValueError if there is none."""
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a run: it has no config.json")
    if is_hf_folder(folder):
        raise ValueError(
            f"{folder} is not a run but a folder of transformers; pass it as init_from"
        )
    config = modernise(read_json(folder / "config.json"))
    choices = config.get("choices")
    if not isinstance(choices, dict) or not {"attn", "pos", "model"} <= choices.keys():
        raise ValueError(
            f"{folder / 'config.json'} is not the config of a run: it lacks attn, pos and model under choices"
        )
    for group, name in choices.items():
        if not re.fullmatch(r"[\w./-]+", str(name)):
            raise ValueError(
                f"{folder / 'config.json'}: choices.{group}={name!r} is not a valid name"
            )
    return config


def refuse_other_text(folder: Path, source: Source) -> None:
    """Raise ValueError if a run was begun with other text than its source has now."""
    then = read_json(folder / "environment.json").get("source")  # earlier versions did not write it
    if then not in (None, source.key()):
        raise ValueError(
            f"{folder} was trained on other text than there is now: choose another folder"
        )


def load_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run; None if it has none."""
    return read_json_or(folder / "summary.json", None)


def load_manifest(folder: Path) -> dict[str, Any]:
    """What a sweep's folder says of it, its sweep.json; empty for runs that were no sweep."""
    return read_json_or(folder / "sweep.json", {})


def open_tokenizer(folder: Path) -> Tokenizer:
    return tokenizers.from_file(folder / "tokenizer.json")


def open_checkpoint(folder: Path, which: str = "latest") -> Checkpoint:
    """A checkpoint of a run. Raises ValueError if there is no intact one."""
    checkpoint, problems = find(folder, which)
    if checkpoint is None:
        raise ValueError("; ".join(problems) or f"{folder} has no checkpoint")
    return checkpoint
