"""Time that a training step spends in attention, from a separate pass."""

import statistics
from collections.abc import Callable, Iterable
from time import perf_counter

from torch import nn

from train.measure.device import Device


def attention_seconds(
    layers: Iterable[nn.Module], step: Callable[[], object], device: Device, repeats: int
) -> float:
    """Seconds that a step spends in attention layers, forward and backward, projections included.

    The median over `repeats` steps with synchronised timers around every layer, which slow it down:
    hence not in the timed loop.
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
        for _ in range(repeats):
            total = 0.0
            step()
            totals.append(total)
    finally:
        for handle in handles:
            handle.remove()
    return statistics.median(totals)
