"""Processes that end when the one that started them does."""

import contextlib
import ctypes
import os
import signal
import sys

PARENT = "HEAD_TO_HEAD_SWEEP"  # how a process is told that of its sweep, or of its run's leader


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
