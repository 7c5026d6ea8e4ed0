"""Time of a training step, next to other packages' models of the same shape."""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.peers import installed
from cli.entry import run_command
from compare.report.tables import markdown
from data.atomic import replace, write_json
from model.cost import flops_per_token
from model.loss import logits_loss
from train.config.compose import compose, parse, quoted
from train.config.schema import arguments as checked
from train.config.schema import at_least, choose
from train.measure import device as devices
from train.measure.device import DTYPES, Device, describe
from train.measure.memory import allocation_peak
from train.measure.timer import ROUNDS, interleave, matmul_flops_per_second
from train.optim.optimizer import Optimizer
from train.parallel.parent import workers
from train.record.terminal import columns, say, tracked
from train.setup.run_setup import check
from train.step import StepResult, TrainStep
from train.step_estimate import random_token_step

USAGE = """\
Time the training step of our models and, where they are installed (pip install -e ".[peers]"), of
other packages' models at the same shape and batch size: interleaved, as medians and ratios.

  python -m bench.step_time [work=NAME,...] [rounds=7] [peers=false] [variants=false] [KEY=VALUE ...]

  work=coursework     6 layers, 6 heads, dim 192, context 16, batch 64
  work=shakespeare    6 layers, 6 heads, dim 384, context 256, batch 64
  work=shakespeare16  the same, batch 16
  work=gpt2           12 layers, 12 heads, dim 768, context 1024, batch 1 on a CPU

The default is the first three. All have LayerNorm, GELU, learned positions, a tied head and no dropout;
KEY=VALUE are keys of train.py that change this for our models, and model.* for the peers, too. Each of
our variants changes one thing. Peers run in a process without any of our settings; each is tried in
float32 and in bfloat16 under autocast, eager and compiled, and timed in its fastest mode.
Writes speed.json and speed.md into outputs/bench.
"""
NOTE = """\
Under bfloat16 autocast our residual stream is bfloat16; transformers, litgpt and x-transformers keep
theirs in float32. Part of our speed in bfloat16 is therefore bought with precision.
"""
SAME = ["attn=mha", "pos=learned", "model.dropout=0", "model.feedforward=gelu", "model.bias=false"]
WORKS = {
    "coursework": ["model=coursework", "model.tie_embeddings=true", "batch_size=64"],
    "shakespeare": ["model=shakespeare", "batch_size=64"],
    "shakespeare16": ["model=shakespeare", "batch_size=16"],
    "gpt2": ["model=gpt2", "batch_size=1"],
}
VARIANTS = (
    "attn=gqa|attn=mqa|attn=sliding attn.window={window}|pos=rope|model.dropout=0.2|memory=lean"
    "|compile=true"
).split("|")
VOCAB = 65
TRIALS = 3  # steps of each mode of a peer, to find its fastest
REFERENCES = ("transformers GPT-2, float32", "transformers GPT-2, float32, compiled")
OUTPUT = Path("outputs/bench")
DEFAULTS = {
    "work": "coursework,shakespeare16,shakespeare",
    "rounds": ROUNDS,
    "peers": True,
    "variants": True,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command. Raises ValueError for values that do not exist."""

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


@dataclass(frozen=True)
class Benchmark:
    """A training step, with the model and the optimizer that hold memory between steps."""

    step: Callable[[], object]
    model: nn.Module
    optimizer: Optimizer

    def peak_bytes(self) -> int:
        """Peak tensor bytes: parameters, optimizer state and what a step allocates."""
        alive = sum(p.nbytes for p in self.model.parameters()) + self.optimizer.nbytes
        return alive + allocation_peak(self.step)


def main(arguments: list[str]) -> int:
    """`python -m bench.step_time`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    own = [a for a in arguments if a.partition("=")[0] in DEFAULTS]
    overrides = [a for a in arguments if a not in own]
    given = {o.key_or_group: o.value() for o in parse(list(map(quote_works, own)))}
    options = Options(**checked("", DEFAULTS | given, Options)[0])
    devices.set_up_process(None, check(compose([*SAME, *overrides])).settings.tf32)
    rows = {work: measure([*SAME, *WORKS[work], *overrides], options) for work in options.works}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    device = devices.select_device("auto", "auto")
    about = dict(describe(device), date=time.strftime("%Y-%m-%d"), rounds=options.rounds, note=NOTE)
    write_json(OUTPUT / "speed.json", {"about": about, "overrides": overrides, "works": rows})
    tables = {work: table(rows[work]) for work in rows}
    text = "".join(f"\n### {work}\n\n{markdown(table)}" for work, table in tables.items())
    replace(OUTPUT / "speed.md", NOTE + text)
    print(f"\n{NOTE}", *(f"{work}\n{columns(t)}\n" for work, t in tables.items()), sep="\n")
    print(f"written: {OUTPUT}/speed.json and .md")
    return 0


def quote_works(override: str) -> str:
    """work=A,B as one string, not as a sweep."""
    key, _, value = override.partition("=")
    return f"{key}={quoted(value)}" if key == "work" else override


def measure(overrides: list[str], options: Options) -> list[dict[str, Any]]:
    """A row for each benchmark at one shape, ours first."""
    dtypes = ["float32"]
    if devices.select_device("auto", "auto").dtype == torch.bfloat16:
        dtypes.insert(0, "bfloat16")
    ours = {
        f"ours, {dtype}": random_token_step(compose([*overrides, f"dtype={dtype}"]), VOCAB)
        for dtype in dtypes
    }
    baseline = ours[f"ours, {dtypes[0]}"]
    length, tokens = baseline.model.shape.max_len, baseline.batches(0)[0].numel()
    if options.variants:
        ours |= variant_steps(overrides, length, dtypes[0])
    benchmarks = {n: Benchmark(successive(s), s.model, s.optimizer) for n, s in ours.items()}
    steps = {name: benchmark.step for name, benchmark in benchmarks.items()}
    peaks = {name: benchmark.peak_bytes for name, benchmark in benchmarks.items()}
    with contextlib.ExitStack() as stack:
        if options.peers:
            pool = stack.enter_context(peer_process(overrides))
            for mode in fastest_modes(pool, dtypes):
                steps[mode] = partial(ask_peers, pool, "step", mode)
                peaks[mode] = partial(ask_peers, pool, "peak_bytes", mode)
        times = interleave(steps, baseline.device, options.rounds, warm_caches=True)
        peak_bytes = {name: peak() for name, peak in peaks.items()}
    flops = {name: flops_per_token(step.model, length) * tokens for name, step in ours.items()}
    devices_of = {dtype: Device(baseline.device.name, DTYPES[dtype]) for dtype in dtypes}
    ceilings = {dtype: matmul_flops_per_second(devices_of[dtype]) for dtype in dtypes}
    rows = []
    for name, seconds in times.items():
        low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
        dtype = name.split(", ")[1]
        step_flops = flops.get(name, flops[f"ours, {dtypes[0]}"])  # a peer's are those of ours
        rows.append(
            {
                "name": name,
                "dtype": dtype,
                "step_ms": 1e3 * median,
                "step_ms_iqr": 1e3 * (high - low),
                "tokens_per_second": tokens / median,
                "peak_bytes": peak_bytes[name],
                "share_of_ceiling": step_flops / median / ceilings[dtype],
                "ceiling_flops": ceilings[dtype],
                "times_ours": {d: ratio_quartiles(seconds, times[f"ours, {d}"]) for d in dtypes},
            }
        )
    return rows


def variant_steps(overrides: list[str], length: int, dtype: str) -> dict[str, TrainStep]:
    """The training steps of our variants, each with one change."""
    steps = {}
    for variant in VARIANTS:
        changes = variant.format(window=length // 8 + 1).split()
        name = f"ours, {dtype}, {' '.join(changes)}"
        try:
            steps[name] = random_token_step(
                compose([*overrides, f"dtype={dtype}", *changes]), VOCAB
            )
        except ValueError as error:  # there may be no compiler
            say(f"{name}: {error}")
    return steps


def successive(step: TrainStep) -> Callable[[], StepResult]:
    """Takes the next step, from 0, at each call."""
    steps = itertools.count()
    return lambda: step(next(steps))


def ratio_quartiles(seconds: list[float], baseline: list[float]) -> list[float]:
    """Quartiles of the ratio to the baseline's time in the same round."""
    ratios = [a / b for a, b in zip(seconds, baseline, strict=True)]
    return statistics.quantiles(ratios, n=4, method="inclusive")


def fastest_modes(pool: Executor, dtypes: list[str]) -> list[str]:
    """Names of each peer in its fastest mode, and of the references."""
    chosen: list[str] = []
    modes = [(dtype, compiled) for compiled in (False, True) for dtype in dtypes]
    for name in ask_peers(pool, "names"):
        seconds: dict[str, float] = {}
        for dtype, compiled in tracked(modes, name):
            mode = f"{name}, {dtype}" + (", compiled" if compiled else "")
            try:
                seconds[mode] = ask_peers(pool, "try_mode", mode, name, dtype, compiled)
            except RuntimeError as error:
                say(f"{mode}: {error}")
        fastest = min(seconds, key=seconds.__getitem__, default=None)
        chosen += [mode for mode in seconds if mode == fastest or mode in REFERENCES]
    ask_peers(pool, "keep", chosen)
    return chosen


class PeerBenchmarks:
    """Benchmarks of other packages' models; each mode is a peer in a dtype, eager or compiled."""

    def __init__(self, overrides: list[str]) -> None:
        self.ours = random_token_step(compose(overrides), VOCAB)
        self.installed = installed(self.ours.model.shape.dropout)
        self.modes: dict[str, Benchmark] = {}

    def names(self) -> list[str]:
        return list(self.installed)

    def try_mode(self, mode: str, name: str, dtype: str, compiled: bool) -> float:
        """Seconds of a step, the median of a few. Raises RuntimeError if it fails."""
        try:
            model = self.installed[name](self.ours.model.shape)
            self.modes[mode] = peer_benchmark(model, self.ours, DTYPES[dtype], compiled)
            step = {mode: self.modes[mode].step}
            return statistics.median(
                interleave(step, self.ours.device, TRIALS, warm_caches=True)[mode]
            )
        except Exception as error:  # noqa: BLE001  another package may raise anything
            reason = " ".join(str(error).split())[:100]
            raise RuntimeError(f"{type(error).__name__}: {reason}") from None

    def keep(self, modes: list[str]) -> None:
        """Free all other modes."""
        self.modes = {mode: self.modes[mode] for mode in modes}

    def step(self, mode: str) -> None:
        self.modes[mode].step()

    def peak_bytes(self, mode: str) -> int:
        return self.modes[mode].peak_bytes()


_peers: PeerBenchmarks  # of the peers' process: the tasks of a pool share state by globals alone


def peer_process(overrides: list[str]) -> Executor:
    """A process for the peers, without our settings, that ends with this one."""
    return workers(1, begin_peers, overrides)


def begin_peers(overrides: list[str]) -> None:
    global _peers
    _peers = PeerBenchmarks(overrides)


def ask_peers(pool: Executor, method: str, *arguments: Any) -> Any:
    """The result of a method of PeerBenchmarks, in the peers' process."""
    return pool.submit(call_peers, method, arguments).result()


def call_peers(method: str, arguments: tuple[Any, ...]) -> Any:
    return getattr(_peers, method)(*arguments)


def peer_benchmark(
    model: nn.Module, ours: TrainStep, dtype: torch.dtype, compiled: bool
) -> Benchmark:
    """Another package's model, trained as nanoGPT does it, with torch's fused AdamW."""
    device = Device(ours.device.name, dtype)
    model.to(device.name).train()
    loss_of = logits_loss
    if compiled:
        model.compile()
        loss_of = torch.compile(logits_loss)  # as ours is, though not as one program with it
    optimizer = Optimizer(model, [torch.optim.AdamW(model.parameters(), fused=True)])

    def step() -> None:
        inputs, targets = ours.batches(0)
        with device.autocast():
            logits = model(inputs.to(device.name))
        loss = loss_of(logits, targets.to(device.name))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step(1e-3)
        optimizer.zero_grad()
        loss.item()
        device.synchronize()

    return Benchmark(step, model, optimizer)


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Rows as text, with a header."""
    dtypes = list(rows[0]["times_ours"])
    head = ["step", "median ms", "IQR", "tokens/s", "peak MiB", "of matmul's ceiling"]
    lines = [[*head, *(f"times ours, {dtype}" for dtype in dtypes)]]
    for row in rows:
        ratios = ["{1:.2f} ({0:.2f} to {2:.2f})".format(*row["times_ours"][d]) for d in dtypes]
        lines.append(
            [
                row["name"],
                f"{row['step_ms']:,.1f}",
                f"{row['step_ms_iqr']:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['share_of_ceiling']:.0%}",
                *ratios,
            ]
        )
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
