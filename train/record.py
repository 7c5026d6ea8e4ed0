"""The record of a run: the files in its folder."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from train.config import choose

LARGEST = 1 << 26  # bytes of a JSON file that are read


class Record:
    """The files of one run. `lock` keeps a second process out until this one ends.

    Raises ValueError if another process holds the folder, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.metrics = folder / "metrics.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.lock = FileLock(folder / ".lock")
            self.lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(f"out={folder} is in use by another process") from error
        except OSError as error:
            raise ValueError(f"out={folder} cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Let other processes in; leave no folder behind if nothing was recorded in it."""
        self.lock.release()
        if not (self.folder / "config.json").exists():
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def write(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON file whole: readers see the old one or the new one."""
        write_json(self.folder / name, content)

    def status(self, state: str, step: int, reason: str | None = None) -> None:
        """Say how the run stands: running, done, failed or interrupted."""
        self.write("status.json", {"state": state, "reason": reason, "last_step": step})

    def log(self, record: Mapping[str, object]) -> None:
        """Append one record to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Force the records so far to disk, so that no checkpoint is ahead of them."""
        with self.metrics.open("a") as file:
            os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Drop the records after a step: they will be written again."""
        kept = (line for line in records(self.metrics) if line["step"] <= step)
        replace(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that was cut off by a kill is left out.

    Raises ValueError for lines that are something else.
    """
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                return
            if not isinstance(record, dict) or not {"step", "split"} <= record.keys():
                raise ValueError(f"{path}: {line[:40]!r} is no record")
            yield record


def replace(path: Path, text: str) -> None:
    """Write a file through a temporary one, so that it is never half there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object whole."""
    replace(path, json.dumps(content, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a run folder. Raises ValueError if it is missing, damaged or huge."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"{path} is larger than {LARGEST:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object")
    return content


def git_commit() -> str | None:
    """The commit of this code, with '+changes' if the tree differs from it; None outside git."""
    root = Path(__file__).resolve().parents[1]
    try:
        ask = ("git", "-C", str(root))
        commit = subprocess.run(
            [*ask, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*ask, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """How Weights & Biases mirrors the run: the keys under wandb."""

    mode: str
    project: str
    group: str | None
    tags: list[str]

    def __post_init__(self) -> None:
        choose("wandb.mode", self.mode, dict.fromkeys(("offline", "online", "disabled")))
