"""Measurements of time and memory."""

import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build, tokens

from train.measure import attention_time
from train.measure.attention_time import attention_seconds
from train.measure.device import Device
from train.measure.memory import allocation_peak, process_peak, reset_process_peak
from train.measure.timer import StepTimer, matmul_flops_per_second

ROOT = Path(__file__).resolve().parents[2]
CPU = Device("cpu", torch.float32)


def test_the_peak_is_exact_to_the_byte() -> None:
    def work() -> None:
        a = torch.empty(1_000_000, dtype=torch.uint8)
        b = torch.empty(3_000_000, dtype=torch.uint8)
        del a
        c = torch.empty(500_000, dtype=torch.uint8)
        del b, c

    assert allocation_peak(work) == 4_000_000


def test_garbage_of_an_earlier_measurement_is_not_taken_off_the_peak() -> None:
    def leave() -> None:
        ring: list[object] = [torch.empty(500_000, dtype=torch.uint8)]
        ring.append(ring)

    def work() -> None:
        gc.collect()
        torch.empty(1_000_000, dtype=torch.uint8)

    assert allocation_peak(leave) == 500_000
    assert allocation_peak(work) == 1_000_000


def test_the_peak_does_not_depend_on_what_is_alive_before() -> None:
    alive = torch.empty(5_000_000, dtype=torch.uint8)
    assert allocation_peak(lambda: torch.empty(2_000_000, dtype=torch.uint8)) == 2_000_000
    del alive


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the high-water mark")
def test_the_high_water_mark_of_the_process_starts_again() -> None:
    torch.ones(100_000_000, dtype=torch.uint8)
    before = process_peak()
    reset_process_peak()
    after = process_peak()
    assert after < before - 50_000_000
    torch.ones(80_000_000, dtype=torch.uint8)
    assert process_peak() > after + 50_000_000


def test_more_kv_heads_take_more_memory_and_more_cache() -> None:
    """Peak memory depends on the number of KV heads, which hand-made comparisons often miss."""

    def step(n: int) -> Callable[[], object]:
        model, x = build("gqa", "rope", f"attn.n_kv_heads={n}").train(), tokens(8, 16)
        return lambda: model(x).sum().backward()

    peaks = [allocation_peak(step(n)) for n in (1, 2, 4)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_warm_up_is_counted_apart_and_the_middle_is_the_median() -> None:
    timer = StepTimer()
    timer.add(9.0, warm=False)
    assert timer.step_ms() == (None, None)
    for seconds in (0.1, 0.2, 0.3, 0.4, 5.0):
        timer.add(seconds, warm=True)
    assert timer.warmup_seconds == 9.0
    assert timer.train_seconds == pytest.approx(6.0)
    assert timer.step_ms() == (pytest.approx(300.0), pytest.approx(200.0))


def test_attention_time_is_that_of_attention_forward_and_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(attention_time, "perf_counter", lambda: now)

    def takes(seconds: float) -> Callable[..., None]:
        def hook(*_: object) -> None:
            nonlocal now
            now += seconds

        return hook

    model, x = build("mha", "rope").train(), tokens(2, 16)
    mechanism = model.attention_layers[0]
    mechanism.q.register_forward_hook(takes(2.0))  # inside: forward
    mechanism.q.register_full_backward_hook(takes(3.0))  # inside: backward
    model.blocks[0].feedforward.register_forward_hook(takes(50.0))  # outside
    seconds = attention_seconds(
        model.attention_layers, lambda: model(x).sum().backward(), CPU, repeats=3
    )
    assert seconds == 5.0
    assert not mechanism._forward_hooks  # the timers are gone


def test_the_ceiling_is_a_rate() -> None:
    assert 1e8 < matmul_flops_per_second(CPU, size=256) < 1e16


def test_the_profiler_writes_nothing_to_the_terminal() -> None:
    """Read from file descriptor 2 of a process that frees memory allocated before the profiler."""
    program = """
import sys, torch
from train.measure.memory import allocation_peak
before = [torch.empty(1_000_000)]
allocation_peak(before.clear)
print("still heard", file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == "still heard\n"
