"""Processes that end when the one that started them does."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

PARENT = "HEAD_TO_HEAD_SWEEP"  # how a process is told that of its sweep, or of its run's leader


def with_parent(more: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that is told of this one as its parent, with more variables."""
    return {**os.environ, PARENT: str(os.getpid()), **more}


def end_with_parent() -> None:
    """In a process that was told of its parent: be told to stop, and save, if the parent dies."""
    if PARENT in os.environ:
        end_with(int(os.environ[PARENT]))


def end_with(parent: int) -> None:
    """Have this process sent a SIGTERM when its parent dies, however that happens (Linux)."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died before that
        raise KeyboardInterrupt


def workers(
    number: int = 1, begin: Callable[..., object] | None = None, *values: Any
) -> ProcessPoolExecutor:
    """Processes that end when this one does, each of which first calls `begin(*values)`.

    They are fresh, without this one's settings and its CUDA.
    """
    return ProcessPoolExecutor(
        number, get_context("spawn"), start_worker, (os.getpid(), begin, values)
    )


def start_worker(parent: int, begin: Callable[..., object] | None, values: tuple[Any, ...]) -> None:
    """What a process of `workers` begins with."""
    end_with(parent)
    if begin is not None:
        begin(*values)
