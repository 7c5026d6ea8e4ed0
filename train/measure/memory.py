"""Peak memory of a run: of tensors and of the process."""

import ctypes
import gc
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

from train.measure.device import Device
from train.parallel.ranks import Ranks


@dataclass
class PeakMemory:
    """Peak memory of training, of validation and of the process, in bytes; None if unknown.

    Of a run in several processes, that of the one with the most: what each of their GPUs must hold.
    Reset after warm-up, read before the first validation and after it; later steps and validations
    need as much. A CPU does not count tensor bytes: there `allocation_peak` measures `train` and
    `eval` after the run. `reserved` is what the allocator took from a GPU, its gaps included: what
    has to fit. With CUDA `graphs` it is all three: memory that a graph holds is not counted as
    allocated.
    """

    graphs: bool = False
    train: int | None = None
    eval: int | None = None
    reserved: int | None = None
    process: int | None = None

    def reset(self, device: Device) -> None:
        """Start again, without imports, data and warm-up."""
        if device.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reset_process_peak()

    def note_training(self, device: Device, ranks: Ranks) -> None:
        """Read the peaks of training, once, in all processes of the run at the same step."""
        if self.process is None:
            self.process = process_peak()
            if device.name == "cuda":
                self.reserved = torch.cuda.max_memory_reserved()
                self.train = self.reserved if self.graphs else torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()
            self.largest(ranks, "train", "reserved", "process")

    def note_validation(self, device: Device, ranks: Ranks) -> None:
        """Read the peak of validation, once, in all processes of the run at the same step."""
        if self.eval is None and device.name == "cuda":
            most = (
                torch.cuda.max_memory_reserved if self.graphs else torch.cuda.max_memory_allocated
            )
            self.eval = most()
            self.largest(ranks, "eval")

    def largest(self, ranks: Ranks, *names: str) -> None:
        """Replace these by the largest that a process has, in one exchange."""
        found = ranks.most([getattr(self, name) or 0 for name in names])
        for name, number in zip(names, found, strict=True):
            setattr(self, name, number or None)

    def method(self, device: Device) -> str | None:
        """How `train` and `eval` were measured."""
        if device.name == "cpu":
            return "profiler allocation records of one step, plus the tensors alive before it"
        if device.name == "cuda":
            return f"torch.cuda.max_memory_{'reserved' if self.graphs else 'allocated'}"
        return None


def allocation_peak(work: Callable[[], object]) -> int:
    """The highest sum of CPU tensor bytes allocated by `work` and not yet freed.

    From the profiler's allocation records, which include those inside opaque operators. The
    profiler remembers allocations of an earlier measurement, and would subtract those freed in this
    one: hence the collection of garbage before.
    """
    gc.collect()
    # torch.profiler's would import the compiler. It writes to stderr when it starts, when it stops,
    # and when `work` frees what was allocated before.
    with quiet(), profile(profile_memory=True) as recorded:
        work()
    kineto: Any = recorded.kineto_results
    events = [e for e in kineto.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what native code writes to stderr."""
    sys.stderr.flush()
    saved, sink = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(sink)


def reset_process_peak() -> None:
    """Reset the high-water mark of the process's memory, where the system can (Linux)."""
    if sys.platform == "linux":
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def process_peak() -> int | None:
    """Peak memory of the process since the last reset, libraries included, in bytes.

    Since its start where the mark cannot be reset (macOS); None where it cannot be read (Windows).
    """
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
