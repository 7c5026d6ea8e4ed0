"""How fast a training step is, beside other packages' models of the same shape."""

import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from bench.peers import installed
from cli.entry import run_command
from compare.cost.step_estimate import random_token_step
from data.atomic import replace, write_json
from train.config.compose import compose, parse, quoted
from train.config.schema import arguments as checked
from train.config.schema import at_least, choose
from train.measure import device as devices
from train.measure.device import DTYPES, Device, describe
from train.measure.memory import allocation_peak
from train.measure.timer import ROUNDS, interleave, matmul_flops_per_second
from train.optim.optimizer import Optimizer
from train.record.terminal import columns, say, tracked
from train.step import StepResult, TrainStep
from train.sweep.processes import end_with

USAGE = """\
Time the training step of our models and, where they are installed (pip install -e ".[peers]"), of
other packages' at the same shape and batch: in alternation, as medians and ratios.

  python -m bench.step_time [work=NAME,...] [rounds=7] [peers=false] [variants=false] [KEY=VALUE ...]

  work=coursework     6 layers, 6 heads, dim 192, context 16, batch 64
  work=shakespeare    6 layers, 6 heads, dim 384, context 256, batch 64
  work=shakespeare16  the same, batch 16
  work=gpt2           12 layers, 12 heads, dim 768, context 1024, batch 1 on a CPU

The first three unless asked. All with LayerNorm, GELU, learned positions, a tied head and no dropout;
KEY=VALUE are keys of train.py that change it for ours, and model.* for the peers, too. Our variants
each change one thing. Peers run as their users run them, in a process with nothing of ours; each is
tried in float32 and in bfloat16 under autocast, as it is and compiled, and its best mode takes part.
Writes speed.json and speed.md into outputs/bench.
"""
SAME = ["attn=mha", "pos=learned", "model.dropout=0", "model.feedforward=gelu", "model.bias=false"]
WORKS = {
    "coursework": ["model=coursework", "model.tie_embeddings=true", "batch_size=64"],
    "shakespeare": ["model=shakespeare", "batch_size=64"],
    "shakespeare16": ["model=shakespeare", "batch_size=16"],
    "gpt2": ["model=gpt2", "batch_size=1"],
}
VARIANTS = (
    "attn=gqa|attn=mqa|attn=sliding attn.window={quarter}|pos=rope|model.dropout=0.2|memory=lean"
    "|compile=true"
).split("|")
VOCAB = 65
TRIALS = 3  # steps of each peer's mode, to find its fastest
REFERENCES = ("transformers GPT-2, float32", "transformers GPT-2, float32, compiled")
INTO = Path("outputs/bench")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command takes beside keys of train.py. Raises ValueError for what cannot be asked."""

    work: str
    rounds: int
    peers: bool
    variants: bool

    def __post_init__(self) -> None:
        at_least(2, self, "rounds")
        for work in self.works:
            choose("work", work, WORKS)

    @property
    def works(self) -> list[str]:
        return self.work.split(",")


DEFAULTS = {
    "work": "coursework,shakespeare16,shakespeare",
    "rounds": ROUNDS,
    "peers": True,
    "variants": True,
}


@dataclass(frozen=True)
class Contender:
    """A training step, and what holds memory between steps."""

    step: Callable[[], object]
    model: nn.Module
    optimizer: Optimizer

    def peak_bytes(self) -> int:
        """The most bytes of tensors at once: parameters, optimizer, and what a step adds."""
        held = sum(p.nbytes for p in self.model.parameters()) + self.optimizer.nbytes
        return held + allocation_peak(self.step)


def main(arguments: list[str]) -> int:
    """`python -m bench.step_time`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    own = [a for a in arguments if a.partition("=")[0] in DEFAULTS]
    overrides = [a for a in arguments if a not in own]
    asked = {o.key_or_group: o.value() for o in parse(list(map(as_text, own)))}
    options = Options(**checked("", DEFAULTS | asked, Options)[0])
    devices.set_up_process(None, compose([*SAME, *overrides])["tf32"])
    found = {work: measure([*SAME, *WORKS[work], *overrides], options) for work in options.works}
    INTO.mkdir(parents=True, exist_ok=True)
    device = devices.select_device("auto", "auto")
    about = dict(describe(device), date=time.strftime("%Y-%m-%d"), rounds=options.rounds)
    write_json(INTO / "speed.json", {"about": about, "overrides": overrides, "works": found})
    tables = {work: table(rows) for work, rows in found.items()}
    replace(INTO / "speed.md", "".join(f"### {w}\n\n{markdown(t)}\n" for w, t in tables.items()))
    for work, rows in tables.items():
        print(f"\n{work}\n{columns(rows)}")
    print(f"\nwritten: {INTO}/speed.json and .md")
    return 0


def as_text(override: str) -> str:
    """work=A,B as one text: a list, not a sweep."""
    key, _, value = override.partition("=")
    return f"{key}={quoted(value)}" if key == "work" else override


def measure(overrides: list[str], options: Options) -> list[dict[str, Any]]:
    """A row for each contender at one shape, ours first."""
    kinds = ["float32"]
    if devices.select_device("auto", "auto").dtype == torch.bfloat16:
        kinds.insert(0, "bfloat16")
    mine = {
        f"ours, {kind}": random_token_step(compose([*overrides, f"dtype={kind}"]), VOCAB)
        for kind in kinds
    }
    baseline = mine[f"ours, {kinds[0]}"]
    if options.variants:
        mine |= variants_of(overrides, baseline.model.shape.max_len, kinds[0])
    contenders = {name: ours(step) for name, step in mine.items()}
    steps = {name: contender.step for name, contender in contenders.items()}
    peaks = {name: contender.peak_bytes for name, contender in contenders.items()}
    with contextlib.ExitStack() as stack:
        if options.peers:
            peers = Peers(stack.enter_context(elsewhere()), overrides)
            for mode in peers.best(kinds):
                steps[mode] = partial(peers.ask, step_peer, mode)
                peaks[mode] = partial(peers.ask, peak_of_peer, mode)
        times = interleave(steps, baseline.device, options.rounds, warm_caches=True)
        held = {name: peak() for name, peak in peaks.items()}
    length, tokens = baseline.model.shape.max_len, baseline.batches(0)[0].numel()
    flops = {name: step.model.flops_per_token(length) * tokens for name, step in mine.items()}
    ceilings = {
        kind: matmul_flops_per_second(Device(baseline.device.name, DTYPES[kind])) for kind in kinds
    }
    rows = []
    for name, seconds in times.items():
        counted = flops.get(name, flops[f"ours, {kinds[0]}"])  # a peer's is that of ours
        low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
        kind = name.split(", ")[1]
        rows.append(
            {
                "contender": name,
                "dtype": kind,
                "step_ms": 1e3 * middle,
                "step_ms_iqr": 1e3 * (high - low),
                "tokens_per_second": tokens / middle,
                "peak_bytes": held[name],
                "share_of_ceiling": counted / middle / ceilings[kind],
                "ceiling_flops": ceilings[kind],
                "times_ours": {k: paired(seconds, times[f"ours, {k}"]) for k in kinds},
            }
        )
    return rows


def variants_of(overrides: list[str], length: int, kind: str) -> dict[str, TrainStep]:
    """Ours with one thing changed."""
    found = {}
    for variant in VARIANTS:
        changes = variant.format(quarter=length // 4).split()
        name = f"ours, {kind}, {' '.join(changes)}"
        try:
            found[name] = random_token_step(compose([*overrides, f"dtype={kind}", *changes]), VOCAB)
        except ValueError as error:  # there may be no compiler
            say(f"{name}: {error}")
    return found


def paired(times: list[float], ours: list[float]) -> list[float]:
    """Quartiles of a contender's time as multiples of ours in the same round."""
    ratios = [a / b for a, b in zip(times, ours, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def ours(step: TrainStep) -> Contender:
    """The trainer's own step, with nothing recorded."""
    return Contender(successive(step), step.model, step.optimizer)


def successive(step: TrainStep) -> Callable[[], StepResult]:
    """Takes the next step, from 0, at each call."""
    steps = itertools.count()
    return lambda: step(next(steps))


@dataclass
class Peers:
    """The other packages' models, in a process of their own that has none of our settings."""

    pool: Executor
    overrides: list[str]

    def best(self, kinds: list[str]) -> list[str]:
        """Names of each peer in its fastest mode, and of the references in theirs."""
        chosen: list[str] = []
        modes = [(kind, compiled) for compiled in (False, True) for kind in kinds]
        for name in self.ask(begin_peers, self.overrides):
            tried: dict[str, float] = {}
            for kind, compiled in tracked(modes, name):
                mode = f"{name}, {kind}" + (", compiled" if compiled else "")
                found = self.ask(try_peer, mode, name, kind, compiled)
                if isinstance(found, str):
                    say(f"{mode}: {found}")
                else:
                    tried[mode] = found
            if tried:
                kept = {min(tried, key=tried.__getitem__), *(m for m in REFERENCES if m in tried)}
                chosen += [mode for mode in tried if mode in kept]
        self.ask(keep_peers, chosen)
        return chosen

    def ask(self, act: Callable[..., T], *arguments: Any) -> T:
        return self.pool.submit(act, *arguments).result()


def elsewhere() -> Executor:
    """A process that ends with this one."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, end_with, (os.getpid(),))


_step: TrainStep  # in the peers' process: the shape and the batches of ours,
_made: dict[str, Contender] = {}  # and each mode of theirs


def begin_peers(overrides: list[str]) -> list[str]:
    """The names of the peers that are installed."""
    global _step
    _step = random_token_step(compose(overrides), VOCAB)
    _made.clear()
    return list(installed(_step.model.shape.dropout))


def try_peer(mode: str, name: str, kind: str, compiled: bool) -> float | str:
    """Seconds of a peer's step, the median of a few; in words why there is none."""
    shape = _step.model.shape
    try:
        build = installed(shape.dropout)[name]
        _made[mode] = peer(build(shape), _step, DTYPES[kind], compiled)
        times = interleave({mode: _made[mode].step}, _step.device, TRIALS, warm_caches=True)
        return statistics.median(times[mode])
    except Exception as error:  # noqa: BLE001  another package's fault ends no benchmark
        return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"


def keep_peers(modes: list[str]) -> None:
    """Let go of all modes but these."""
    for mode in _made.keys() - set(modes):
        del _made[mode]


def step_peer(mode: str) -> None:
    _made[mode].step()


def peak_of_peer(mode: str) -> int:
    return _made[mode].peak_bytes()


def peer(model: nn.Module, ours: TrainStep, dtype: torch.dtype, compiled: bool) -> Contender:
    """A step of another package's model: its forward, the rest as nanoGPT does it, fused."""
    device = Device(ours.device.name, dtype)
    model.to(device.name).train()
    if compiled:
        model.compile()
    optimizer = Optimizer(model, [torch.optim.AdamW(model.parameters(), fused=True)])

    def step() -> None:
        inputs, targets = ours.batches(0)
        with device.autocast():
            logits = model(inputs.to(device.name))
        loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten().to(device.name))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step(1e-3)
        optimizer.zero_grad()
        loss.item()
        device.synchronize()

    return Contender(step, model, optimizer)


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows for people."""
    kinds = list(rows[0]["times_ours"])
    head = ["step", "median ms", "IQR", "tokens/s", "peak MiB", "of matmul's ceiling"]
    lines = [[*head, *(f"times ours, {kind}" for kind in kinds)]]
    for row in rows:
        ratios = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*row["times_ours"][kind]) for kind in kinds]
        lines.append(
            [
                row["contender"],
                f"{row['step_ms']:,.1f}",
                f"{row['step_ms_iqr']:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['share_of_ceiling']:.0%}",
                *ratios,
            ]
        )
    return lines


def markdown(rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(rows[0]) - 1)]
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
