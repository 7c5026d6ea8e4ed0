"""Time that a training step spends in attention, from a separate pass."""

import statistics
import warnings
from collections.abc import Callable, Iterable
from time import perf_counter

import torch
from torch import nn

from train.measure.device import Device


def attention_seconds(
    layers: Iterable[nn.Module], step: Callable[[], object], device: Device, repeats: int
) -> float:
    """Seconds that a step spends in attention layers, forward and backward, projections included.

    The median over `repeats` steps with timers around every layer, which slow it down: hence not in
    the timed loop. On CUDA they are events among the kernels, so that neither their launches nor the
    time between them counts.
    """
    clock = Events() if device.name == "cuda" else Clock(device)

    def start(*_: object) -> None:
        clock.start()

    def stop(*_: object) -> None:
        clock.stop()

    handles = [
        handle
        for layer in layers
        for handle in (
            layer.register_forward_pre_hook(start),
            layer.register_forward_hook(stop),
            layer.register_full_backward_pre_hook(start),
            layer.register_full_backward_hook(stop),
        )
    ]
    totals = []
    try:
        with warnings.catch_warnings():
            # The first layer has no backward pass where nothing before it is trained.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            for _ in range(repeats):
                step()
                totals.append(clock.read())
    finally:
        for handle in handles:
            handle.remove()
    return statistics.median(totals)


class Clock:
    """Time between starts and stops, by the host, which waits for the device at each."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.total = self.started = 0.0

    def start(self) -> None:
        self.device.synchronize()
        self.started = perf_counter()

    def stop(self) -> None:
        self.device.synchronize()
        self.total += perf_counter() - self.started

    def read(self) -> float:
        """Seconds since the last reading."""
        total, self.total = self.total, 0.0
        return total


class Events:
    """The same by the GPU itself, without waiting before it is read."""

    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def start(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    stop = start

    def read(self) -> float:
        """Seconds since the last reading."""
        torch.cuda.synchronize()
        pairs = zip(self.events[::2], self.events[1::2], strict=True)
        total = sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3
        self.events = []
        return total
