"""Atomic folders and files: complete and verified, or absent. For token caches and checkpoints."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
MANIFEST = "MANIFEST.json"
TEMPORARY = ".tmp-"  # prefix of unfinished folders


def publish(folder: Path, write: Callable[[Path], None], needs: int) -> None:
    """Let `write` fill a temporary folder beside `folder`, then make it appear there whole.

    Every file, a manifest of their SHA-256 and both directories are synced before and after the
    rename, so a crash or power loss leaves the old state or the new one; of an existing `folder`, which
    is replaced, in the instant between two renames neither. The caller keeps other writers of this
    folder out. Raises OSError, with the bytes that it `needs` and those free, if anything cannot be
    written.
    """
    temporary = folder.parent / f"{TEMPORARY}{folder.name}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        write(temporary)
        hashes = {path.name: sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(hashes, indent=1))
        for path in [*temporary.iterdir(), temporary]:
            sync(path)
        discard(folder)
        temporary.rename(folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # before counting what is free
        failed = OSError(
            f"could not write {folder}: {error.strerror or error}; "
            f"it needs about {needs:,} bytes, {free_bytes(folder):,} are free"
        )
        failed.errno = error.errno
        raise failed from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def discard(folder: Path) -> None:
    """Delete a folder, if it exists, in one step: it is never partly there."""
    going = folder.parent / f"{TEMPORARY}{folder.name}-old"
    shutil.rmtree(going, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def verify(folder: Path) -> None:
    """Raise ValueError, naming the file, unless `folder` holds all that `publish` left there."""
    try:
        hashes = json.loads((folder / MANIFEST).read_text())
        for name, expected in hashes.items():
            if sha256(folder / Path(name).name) != expected:
                raise ValueError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    except (
        OSError,
        UnicodeDecodeError,
        json.JSONDecodeError,
        AttributeError,
        RecursionError,
    ) as error:
        raise ValueError(f"{folder} is not complete: {error}") from error


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or directory to disk (Windows has no way to do so for a directory)."""
    if os.name == "nt" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Bytes free on the disk that holds a path, which need not exist."""
    return shutil.disk_usage(next(p for p in path.absolute().parents if p.exists())).free


LARGEST = 1 << 26  # bytes of a JSON file that are read


def replace(path: Path, text: str) -> None:
    """Write a file through a temporary one, so that it is never partly there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON object atomically."""
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


def read_json_or(path: Path, otherwise: T) -> dict[str, Any] | T:
    """A JSON object from a run folder; `otherwise` if there is no such file. Raises as `read_json`."""
    return read_json(path) if path.exists() else otherwise
