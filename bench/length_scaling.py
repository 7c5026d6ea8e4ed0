"""Time and memory of one attention layer against the length of the text: python -m bench.length_scaling."""

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cli.entry import run_command
from train.config.compose import compose, group_of
from train.measure import device as devices
from train.measure.device import Device
from train.measure.memory import allocation_peak
from train.measure.timer import interleave
from train.record.terminal import columns, tracked
from train.setup.build import build_model, init_model

USAGE = """\
Forward and backward of one attention layer, batch 1, at growing lengths: a sliding window next to
full attention, in alternation. Prints medians, peak tensor bytes and their growth from the length
before, and draws them into outputs/scaling.svg.

  python -m bench.length_scaling [KEY=VALUE ...]      keys of train.py; model=shakespeare, pos=rope and
                                                 attn.window=256 unless given
"""
LENGTHS = (512, 1024, 2048, 4096, 8192)
DEFAULTS = ["model=shakespeare", "model.dropout=0", "pos=rope"]
SLIDING = ["attn=sliding", "attn.window=256"]
ROUNDS = 7


def main(overrides: list[str]) -> int:
    """`python -m bench.length_scaling`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    own = [o for o in overrides if group_of(o.partition("=")[0]) == "attn"]
    if "attn" in (o.partition("=")[0] for o in own):
        raise ValueError(
            "attn: the contenders are sliding and full attention; attn.window=W sets one"
        )
    both = [*DEFAULTS, *(o for o in overrides if o not in own)]
    heads = [o for o in own if o.startswith("attn.n_kv_heads=")]
    full = ["attn=gqa", *heads] if heads else ["attn=mha"]
    contenders = {"sliding": [*both, *SLIDING, *own], "full": [*both, *full]}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, list[float]] = {name: [] for name in contenders}
    kernels: dict[str, list[str]] = {name: [] for name in contenders}
    asked = compose(both)
    devices.set_up_process(asked["threads"], asked["tf32"])
    for length in tracked(LENGTHS, "timing"):
        passes = {name: layer_pass(choice, length) for name, choice in contenders.items()}
        device = passes["full"][1]
        times = interleave({name: work for name, (work, *_) in passes.items()}, device, ROUNDS)
        for name, (work, _, kernel) in passes.items():
            kernels[name].append(kernel)
            seconds[name].append(statistics.median(times[name]))
            peaks[name].append(peak_of(work, device))
    rows = [
        [
            "N",
            *(
                f"{name} {what}"
                for name in contenders
                for what in ("ms", "x", "MiB", "x", "kernel")
            ),
        ]
    ]
    for i, length in enumerate(LENGTHS):
        row = [f"{length:,}"]
        for name in contenders:
            row += [f"{1e3 * seconds[name][i]:,.1f}", growth(seconds[name], i)]
            row += [f"{peaks[name][i] / 2**20:,.1f}", growth(peaks[name], i)]
            row.append(kernels[name][i])
        rows.append(row)
    print(f"one layer on {device.name} in {device.dtype_name}, {torch.get_num_threads()} threads")
    print(columns(rows))
    path = Path("outputs/scaling.svg")
    draw(path, seconds, peaks)
    print(f"\nwritten: {path}")
    return 0


def layer_pass(overrides: list[str], length: int) -> tuple[Callable[[], None], Device, str]:
    """Forward and backward of the first attention layer of a model at this length, and its kernel."""
    config = compose([*overrides, f"model.max_len={length}"])
    device = devices.select_device(config["device"], config["dtype"], False)
    model = build_model(config, 65)
    init_model(model, config, 0)
    model.to(device.name)
    mechanism, position = model.mechanisms[0], model.position
    x = torch.randn(1, length, model.shape.dim, device=device.name, requires_grad=True)
    pos = torch.arange(length, device=device.name)

    def work() -> None:
        with device.autocast():
            y = mechanism(x, pos, position.rotate, position.bias, None)
        y.float().sum().backward()
        model.zero_grad()
        x.grad = None

    return work, device, model.kernels(device.name, device.dtype, length)[0]


def peak_of(work: Callable[[], None], device: Device) -> int:
    """The highest sum of tensor bytes that a pass allocates."""
    if device.name != "cuda":
        return allocation_peak(work)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def growth(values: Sequence[float], i: int) -> str:
    """A value as a multiple of the one before."""
    return f"{values[i] / values[i - 1]:.2f}" if i else ""


def draw(path: Path, seconds: dict[str, list[float]], peaks: dict[str, list[float]]) -> None:
    """Time and memory against length, both axes logarithmic, as SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for axes, values, scale in ((time, seconds, 1e3), (memory, peaks, 2**-20)):
        for name, found in values.items():
            axes.loglog(LENGTHS, [scale * v for v in found], marker="o", label=name, base=2)
    for axes, unit in ((time, "forward and backward, ms"), (memory, "peak memory, MiB")):
        axes.set(xlabel="tokens", ylabel=unit, xticks=LENGTHS, xticklabels=map(str, LENGTHS))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
