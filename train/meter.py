"""What a run cost: time and memory."""

import contextlib
import ctypes
import gc
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile

from train.device import Device


@dataclass
class Clock:
    """Time spent on optimizer steps, warm-up apart. On resume it goes on from the checkpoint.

    Every start of a process has warm-up steps of its own: caches are cold, and a model may compile.
    """

    warmup_seconds: float = 0.0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)  # of the steps after warm-up

    def add(self, seconds: float, warm: bool) -> None:
        """Count one step of so many seconds."""
        if warm:
            self.train_seconds += seconds
            self.step_seconds.append(seconds)
        else:
            self.warmup_seconds += seconds

    @property
    def seconds(self) -> float:
        """All steps, warm-up included."""
        return self.warmup_seconds + self.train_seconds

    def step_ms(self) -> tuple[float | None, float | None]:
        """Median and interquartile range of a step, in ms; None before there are enough steps."""
        ms = [1e3 * seconds for seconds in self.step_seconds]
        if len(ms) < 2:
            return (ms[0] if ms else None), None
        low, middle, high = statistics.quantiles(ms, n=4, method="inclusive")
        return middle, high - low


@dataclass
class Peaks:
    """The most memory held while training and while validating, apart; in bytes, None if unknown.

    Noted at the run's own pace: reset after warm-up, read before the first validation and after it.
    Later steps and validations are alike. On a CPU, which counts no tensor bytes by itself,
    `allocation_peak` fills in `train` and `eval` after the run.
    """

    train: int | None = None
    eval: int | None = None
    process: int | None = None

    def reset(self, device: Device) -> None:
        """Forget what came before: imports, data, warm-up."""
        if device.name == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reset_process_peak()

    def note_training(self, device: Device) -> None:
        if self.process is None:
            self.process = process_peak()
            if device.name == "cuda":
                self.train = torch.cuda.max_memory_allocated()
                torch.cuda.reset_peak_memory_stats()

    def note_validation(self, device: Device) -> None:
        if self.eval is None and device.name == "cuda":
            self.eval = torch.cuda.max_memory_allocated()


PEAK_METHODS = {
    "cuda": "torch.cuda.max_memory_allocated",
    "cpu": "profiler allocation records of one step, plus the tensors alive before it",
}


def allocation_peak(work: Callable[[], object]) -> int:
    """The highest sum of CPU tensor bytes allocated by `work` and not yet freed.

    From the profiler's allocation records, which see inside opaque operators too. They know what
    was allocated under an earlier measurement: garbage of it, freed in this one, would be taken off.
    """
    gc.collect()
    recorded: Any = profile(profile_memory=True)  # torch.profiler's would import the compiler
    begun = contextlib.ExitStack()
    with quiet():
        begun.enter_context(recorded)
    work()
    with quiet():
        begun.close()
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what native code writes to stderr: the profiler announces itself there."""
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
    """Make the process's high-water mark start again from now, where the system can (Linux)."""
    if sys.platform == "linux":
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def process_peak() -> int | None:
    """The most memory that the process held since the last reset, libraries included, in bytes.

    Where the mark cannot be reset (macOS) since the start; None where it cannot be read (Windows).
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


def attention_seconds(
    mechanisms: Iterable[object], step: Callable[[], object], device: Device, repeats: int
) -> float:
    """Time that one step spends in attention, forward and backward, projections included.

    The median over `repeats` steps, run with synchronised timers around every mechanism: apart from
    the timed loop, which they would slow down.
    """
    total = started = 0.0

    def start(*_: object) -> None:
        nonlocal started
        device.synchronize()
        started = perf_counter()

    def stop(*_: object) -> None:
        nonlocal total
        device.synchronize()
        total += perf_counter() - started

    handles = [
        handle
        for m in cast(Iterable[nn.Module], mechanisms)
        for handle in (
            m.register_forward_pre_hook(start),
            m.register_forward_hook(stop),
            m.register_full_backward_pre_hook(start),
            m.register_full_backward_hook(stop),
        )
    ]
    totals = []
    for _ in range(repeats):
        total = 0.0
        step()
        totals.append(total)
    for handle in handles:
        handle.remove()
    return statistics.median(totals)


def matmul_flops(device: Device, size: int = 2048, repeats: int = 5) -> float:
    """The FLOP/s that this device reaches on a large square matrix product: the ceiling for MFU."""
    if device.name != "cpu":
        size *= 4
    a = torch.randn(size, size, device=device.name, dtype=device.dtype)
    best = float("inf")
    for _ in range(repeats):
        device.synchronize()
        start = perf_counter()
        product: Tensor = a @ a
        device.synchronize()
        best = min(best, perf_counter() - start)
    del product
    return 2 * size**3 / best
