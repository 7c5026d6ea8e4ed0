"""How fast a training step is, beside transformers' GPT-2 of the same shape: python -m compare.speed."""

import statistics
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, TypeVar, cast

import torch
from torch.nn import functional as F

from compare.probe import bare_job
from train import device as devices
from train.cli import door
from train.config import compose
from train.device import Device
from train.job import Job
from train.trainer import Trainer

USAGE = """\
Time one training step of each contender, in alternation, and print medians and ratios.

  python -m compare.speed [KEY=VALUE ...]      keys of train.py; model=shakespeare without dropout,
                                               attn=mha pos=learned batch_size=16 unless given

The peer is transformers' GPT-2, eager, float32: pip install transformers.
"""
K = TypeVar("K")
VOCAB = 65
ROUNDS = 9
DEFAULTS = ["model=shakespeare", "attn=mha", "pos=learned", "model.dropout=0", "batch_size=16"]


def main(overrides: list[str]) -> int:
    """`python -m compare.speed`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    contenders: dict[str, Callable[[], object]] = {}
    for dtype in ("auto", "float32"):
        job = bare_job(compose([*DEFAULTS, f"dtype={dtype}", *overrides]), VOCAB)
        contenders[f"ours, {job.device.dtype_name}"] = step_of(job)
    contenders["transformers GPT-2, eager, float32"] = peer(job)
    devices.set_up(None)
    times = alternate(contenders, job.device)
    slowest = statistics.median(times["transformers GPT-2, eager, float32"])
    print(f"{'step':<36}  median ms     IQR   times as fast")
    for name, seconds in times.items():
        low, middle, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
        print(f"{name:<36}  {middle:9.1f}  {high - low:6.1f}   {1e3 * slowest / middle:13.2f}")
    return 0


def step_of(job: Job) -> Callable[[], object]:
    """The trainer's own step, with nothing recorded."""
    trainer = Trainer(job, cast(Any, None))
    return lambda: trainer.update(0)


def peer(job: Job) -> Callable[[], object]:
    """transformers' GPT-2 of a job's shape: forward, backward, clipping and AdamW, by its defaults."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise ValueError("the peer is not installed: pip install transformers") from error
    shape = job.model.shape
    config = GPT2Config(
        vocab_size=shape.vocab_size,
        n_positions=shape.max_len,
        n_embd=shape.dim,
        n_layer=shape.n_layers,
        n_head=shape.n_heads,
        resid_pdrop=shape.dropout,
        embd_pdrop=shape.dropout,
        attn_pdrop=shape.dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    model: Any = GPT2LMHeadModel(config)
    model.to(job.device.name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step() -> None:
        inputs, targets = job.batches(0)
        logits = model(inputs.to(job.device.name)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(job.device.name))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    return step


def alternate(
    contenders: Mapping[K, Callable[[], object]],
    device: Device,
    rounds: int = ROUNDS,
    warm_up: int = 2,
) -> dict[K, list[float]]:
    """Seconds of each contender's step, taken in turn after some rounds of warm-up."""
    times: dict[K, list[float]] = {name: [] for name in contenders}
    for turn in range(warm_up + rounds):
        for name, step in contenders.items():
            device.synchronize()
            start = perf_counter()
            step()
            device.synchronize()
            if turn >= warm_up:
                times[name].append(perf_counter() - start)
    return times


if __name__ == "__main__":
    sys.exit(door(main, sys.argv[1:]))
