"""The files that a run writes into its folder."""

import contextlib
import functools
import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from data.atomic import replace, write_json


class Record:
    """The files of one run. A lock keeps other processes out until it is closed.

    Raises ValueError if another process holds the lock, or the folder cannot be written.
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
        """Release the lock; delete the folder if nothing was recorded in it."""
        self.lock.release()
        if not (self.folder / "config.json").exists():
            (self.folder / ".lock").unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def write(self, name: str, content: Mapping[str, object]) -> None:
        """Write a JSON file atomically."""
        write_json(self.folder / name, content)

    def status(self, state: str, step: int, reason: str | None = None) -> None:
        """Write the run's status: running, done, failed or interrupted."""
        self.write("status.json", {"state": state, "reason": reason, "last_step": step})

    def log(self, record: Mapping[str, object]) -> None:
        """Append one record to metrics.jsonl."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def sync(self) -> None:
        """Flush the records to disk, so that no checkpoint is ahead of them."""
        with self.metrics.open("a") as file:
            os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Drop the records after a step: they are written again on resume."""
        kept = (line for line in records(self.metrics) if line["step"] <= step)
        replace(self.metrics, "".join(json.dumps(line) + "\n" for line in kept))


class NoRecord(Record):
    """For the processes of a run that write none of its files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def close(self) -> None:
        pass

    def write(self, name: str, content: Mapping[str, object]) -> None:
        pass

    def log(self, record: Mapping[str, object]) -> None:
        pass

    def sync(self) -> None:
        pass


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics.jsonl, without a last line cut off by a kill.

    Raises ValueError for a line that is not a record.
    """
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                return
            if not isinstance(record, dict) or not {"step", "split"} <= record.keys():
                raise ValueError(f"{path}: {line[:40]!r} is not a record")
            yield record


CHANGES = "+changes"  # after a commit: the working tree has others


@functools.cache
def git_commit() -> str | None:
    """Commit of this code when first asked for, with CHANGES if the working tree differs.

    None outside git.
    """
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + (CHANGES if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
