"""Timing: optimizer steps, alternatives in turn, a large matrix product."""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeVar

import torch
from torch import Tensor

from train.measure.device import Device

ROUNDS = 7
K = TypeVar("K")


@dataclass
class StepTimer:
    """Seconds spent on optimizer steps, warm-up apart. On resume it continues from the checkpoint.

    Every process has warm-up steps of its own: caches are cold, and a model may compile.
    """

    warmup_seconds: float = 0.0
    train_seconds: float = 0.0
    wall_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)  # of the steps after warm-up

    def add(self, seconds: float, warm: bool) -> None:
        """Count one step."""
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


def matmul_flops_per_second(device: Device, size: int = 2048, repeats: int = 5) -> float:
    """Highest FLOP/s that the device reaches in a large square matrix product: the ceiling for MFU."""
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


def interleave(
    steps: Mapping[K, Callable[[], object]],
    device: Device,
    rounds: int = ROUNDS,
    warm_up: int = 2,
    warm_caches: bool = False,
) -> dict[K, list[float]]:
    """Seconds of each step, timed in turn, round after round, after `warm_up` untimed rounds.

    With `warm_caches`, a step of less than a second runs twice in its turn, and the second run
    counts: the first finds the caches, and a compiled program's threads, as another step left them.
    """
    times: dict[K, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + rounds):
        for name, step in steps.items():
            seconds = timed(step, device)
            if warm_caches and seconds < 1:
                seconds = timed(step, device)
            if turn >= warm_up:
                times[name].append(seconds)
    return times


def timed(step: Callable[[], object], device: Device) -> float:
    """Seconds of one step."""
    device.synchronize()
    start = perf_counter()
    step()
    device.synchronize()
    return perf_counter() - start
