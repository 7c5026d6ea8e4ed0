"""Time and memory of one attention layer against sequence length: python -m bench.length_scaling."""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cli.entry import run_command
from compare.report.style import COLOURS, MARKERS, Drawing, canvas, legend, pictured
from model.attention import KERNELS
from model.cost import training_kernels
from train.config.compose import compose, group_of
from train.config.schema import choose
from train.measure import device as devices
from train.measure.device import Device
from train.measure.memory import allocation_peak
from train.measure.timer import interleave
from train.record.terminal import columns, tracked
from train.setup.build import build_model, init_model
from train.setup.run_setup import check, check_kernel

USAGE = """\
Forward and backward of one attention layer at growing lengths, batch 1: sliding-window and full
attention, interleaved; or, with several kernels, one attention with each. Prints median times, peak
tensor bytes and their growth from the previous length, and draws them into outputs/scaling.svg.

  python -m bench.length_scaling [KEY=VALUE ...]
  python -m bench.length_scaling [kernel=A,B] [KEY=VALUE ...]

KEY=VALUE are keys of train.py; the defaults are model=shakespeare, pos=rope and attn.window=129 (128 tokens back).

Example
  python -m bench.length_scaling kernel=matmul,flash attn=mha pos=rope
"""
LENGTHS = (512, 1024, 2048, 4096, 8192)
DEFAULTS = ["model=shakespeare", "model.dropout=0", "pos=rope"]
SLIDING = ["attn=sliding", "attn.window=129"]
OUTPUT = Path("outputs/scaling.svg")


@dataclass(frozen=True)
class Result:
    """Median time and peak tensor memory of a layer's pass, and its kernel."""

    ms: float
    mib: float
    kernel: str


def main(overrides: list[str]) -> int:
    """`python -m bench.length_scaling`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    variants = variants_of(overrides)
    config = compose(next(iter(variants.values())))
    spec = check(config)
    devices.set_up_process(spec.settings.threads, spec.settings.tf32)
    device = devices.select_device(config["device"], config["dtype"], False)
    results = [measure(variants, length, device) for length in tracked(LENGTHS, "timing")]
    curves = {name: [result[name] for result in results] for name in variants}
    print(f"one layer on {device.name} in {device.dtype_name}, {torch.get_num_threads()} threads")
    print(columns(table(curves)))
    draw(curves).write(OUTPUT)
    return 0


def variants_of(overrides: list[str]) -> dict[str, list[str]]:
    """The overrides of what is compared, by name: one attention with each of several kernels, or
    sliding-window and full attention with equally many KV heads."""
    listed = [o for o in overrides if o.startswith("kernel=") and "," in o]
    if listed:
        rest = [*DEFAULTS, *(o for o in overrides if o not in listed)]
        kernels = listed[-1].removeprefix("kernel=").split(",")
        return {kernel: [*rest, f"kernel={kernel}"] for kernel in kernels}
    attn = [o for o in overrides if group_of(o.partition("=")[0]) == "attn"]
    if any(o.partition("=")[0] == "attn" for o in attn):
        raise ValueError(
            "attn is fixed: sliding-window and full attention; attn.window=W sets one, "
            "and kernel=matmul,flash compares kernels of any attention"
        )
    both = [*DEFAULTS, *(o for o in overrides if o not in attn)]
    heads = [o for o in attn if o.startswith("attn.n_kv_heads=")]
    full = ["attn=gqa", *heads] if heads else ["attn=mha"]
    return {"sliding": [*both, *SLIDING, *attn], "full": [*both, *full]}


def measure(variants: dict[str, list[str]], length: int, device: Device) -> dict[str, Result]:
    """The results of all variants at one length, timed in turn."""
    passes = {name: layer_pass(variant, length, device) for name, variant in variants.items()}
    seconds = interleave({name: run for name, (run, _) in passes.items()}, device)
    return {
        name: Result(
            1e3 * statistics.median(seconds[name]), peak_bytes(run, device) / 2**20, kernel
        )
        for name, (run, kernel) in passes.items()
    }


def layer_pass(overrides: list[str], length: int, device: Device) -> tuple[Callable[[], None], str]:
    """Forward and backward of the first attention layer of a model at this length, and its kernel."""
    config = compose([*overrides, f"model.max_len={length}"])
    choose("kernel", config["kernel"], dict.fromkeys(KERNELS))
    if config["kernel"] == "flex":
        raise ValueError("kernel=flex is for compiled models, and this layer is not compiled")
    model = build_model(config, 65)
    check_kernel(model, config["kernel"], device)
    init_model(model, config, 0)
    model.to(device.name)
    attention = model.attention_layers[0]
    x = torch.randn(1, length, model.shape.dim, device=device.name, requires_grad=True)
    positions = model.position.at(torch.arange(length, device=device.name)).of_layer(0)

    def run() -> None:
        with device.autocast():
            y = attention(x, positions)
        y.float().sum().backward()
        model.zero_grad()
        x.grad = None

    return run, training_kernels(model, device.name, device.dtype, length)[0]


def peak_bytes(run: Callable[[], None], device: Device) -> int:
    """Peak of the tensor bytes that a pass allocates."""
    if device.name != "cuda":
        return allocation_peak(run)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


def table(curves: dict[str, list[Result]]) -> list[list[str]]:
    """A row for each length: time, memory and kernel of each variant, with growth factors."""
    rows = [["N"]]
    for name in curves:
        rows[0] += [f"{name} {column}" for column in ("ms", "x", "MiB", "x", "kernel")]
    for i, length in enumerate(LENGTHS):
        rows.append([f"{length:,}"])
        for results in curves.values():
            now, before = results[i], results[i - 1] if i else None
            rows[-1] += [f"{now.ms:,.1f}", f"{now.ms / before.ms:.2f}" if before else ""]
            rows[-1] += [f"{now.mib:,.1f}", f"{now.mib / before.mib:.2f}" if before else ""]
            rows[-1].append(now.kernel)
    return rows


@pictured("scaling")
def draw(curves: dict[str, list[Result]]) -> Drawing:
    """Time and memory against length, on logarithmic axes."""
    figure, (time, memory) = canvas(2, 3.4)
    for (name, results), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        style = {"color": colour, "marker": marker, "base": 2, "label": name}
        time.loglog(LENGTHS, [result.ms for result in results], **style)
        memory.loglog(LENGTHS, [result.mib for result in results], **style)
    for axes, unit in ((time, "forward and backward, ms"), (memory, "peak memory, MiB")):
        axes.set(xlabel="tokens", ylabel=unit, xticks=LENGTHS, xticklabels=map(str, LENGTHS))
        axes.yaxis.set_major_formatter("{x:g}")
    legend(time, len(curves))
    return figure, "One attention layer against length."


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
