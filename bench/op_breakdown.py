"""Where the time of a training step goes, and how near its products are to the device's limit."""

import statistics
import sys
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.step_time import VOCAB, successive
from cli.entry import run_command
from compare.cost.step_estimate import random_token_step
from train.config.compose import compose
from train.measure import device as devices
from train.measure.device import Device
from train.measure.timer import ROUNDS, interleave, matmul_flops_per_second
from train.optim.optimizer import Optimizer
from train.record.terminal import columns
from train.step import TrainStep

USAGE = """\
Where the time of a training step goes: medians of 7 steps on random tokens, each operation timed by
itself, and the share of one large product's FLOPs a second that a part's products reach. Between
operations lies the rest of a step that nobody watched: on a busy machine it may come out negative.

  python -m bench.op_breakdown [KEY=VALUE ...]

KEY=VALUE are keys of train.py, as in model=shakespeare attn=gqa batch_size=64.
"""
OPTIMIZER, OTHER, BETWEEN = "optimizer, clipping", "other operations", "between operations"

#: What torch's operations do in a step, by how their names begin; the first that fits counts.
PARTS = {
    "products with weights": ("mm", "addmm"),
    "attention's products": ("bmm", "baddbmm", "_scaled_dot_product"),
    "softmax": ("_softmax", "_log_softmax"),
    "activation": ("gelu", "relu", "threshold_backward", "silu", "pow"),
    "norms": ("native_layer_norm", "linalg_vector_norm", "rsqrt", "_fused_rms_norm"),
    "copies and casts": ("_to_copy", "clone", "copy", "cat", "repeat"),
    "sums and factors": ("add", "sub", "mul", "div", "neg", "sum"),
    "random numbers": ("random", "bernoulli", "native_dropout"),
    OPTIMIZER: ("_foreach",),  # and all that the optimizer's step does
}


@dataclass(frozen=True)
class Operation:
    """One call of one of torch's operations."""

    part: str
    seconds: float
    flops: int


class Stopwatch(TorchDispatchMode):
    """Within it, every operation is waited for and noted."""

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.noted: list[Operation] = []
        self.stepping = False  # whether the optimizer is at work

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        start = perf_counter()
        out = func(*args, **kwargs)
        self.device.synchronize()
        seconds = perf_counter() - start
        operation = func.overloadpacket
        part = OPTIMIZER if self.stepping else part_of(operation.__name__)
        count = flop_registry.get(operation, lambda *_, **__: 0)
        self.noted.append(Operation(part, seconds, count(*args, **kwargs, out_val=out)))
        return out


def part_of(operation: str) -> str:
    return next((part for part, names in PARTS.items() if operation.startswith(names)), OTHER)


def main(arguments: list[str]) -> int:
    """`python -m bench.op_breakdown`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    config = compose(arguments)
    if config["compile"] is True:
        raise ValueError("compile=true leaves no operations to tell apart; compile=false does")
    devices.set_up_process(config["threads"], config["tf32"])
    step = random_token_step(config | {"compile": False}, VOCAB)
    whole, steps = measure(step)
    print(columns(table(whole, steps, matmul_flops_per_second(step.device))))
    return 0


class WatchedOptimizer(Optimizer):
    """An optimizer that tells a stopwatch when it is stepping."""

    def __init__(self, step: TrainStep, watch: Stopwatch) -> None:
        super().__init__(step.model, step.optimizer.optimizers)
        self.watch = watch

    def step(self, lr: float) -> None:
        self.watch.stepping = True
        super().step(lr)
        self.watch.stepping = False


def measure(step: TrainStep) -> tuple[float, list[list[Operation]]]:
    """Seconds of an unwatched step, and the operations of watched ones, taken in turns."""
    watch, steps = Stopwatch(step.device), list[list[Operation]]()
    watched_step = successive(replace(step, optimizer=WatchedOptimizer(step, watch)))

    def watched() -> None:
        watch.noted = []
        with watch:
            watched_step()
        steps.append(watch.noted)

    times = interleave({"alone": successive(step), "watched": watched}, step.device, ROUNDS)
    return statistics.median(times["alone"]), steps[-ROUNDS:]


def table(whole: float, steps: list[list[Operation]], ceiling: float) -> list[list[str]]:
    """A row for each part, the longest first; what is left of the whole step lies between them."""
    seconds = {
        part: statistics.median(sum(o.seconds for o in step if o.part == part) for step in steps)
        for part in {o.part for o in steps[-1]}
    }
    lines = [["part", "calls", "ms", "of the step", "GFLOP", "of matmul's ceiling"]]

    def line(name: str, took: float, operations: list[Operation]) -> None:
        flops = sum(o.flops for o in operations)
        lines.append(
            [
                name,
                f"{len(operations):,}" if operations else "-",
                f"{1e3 * took:,.1f}",
                f"{took / whole:.0%}",
                f"{flops / 1e9:,.1f}" if flops else "-",
                f"{flops / took / ceiling:.0%}" if flops else "-",
            ]
        )

    for part in sorted(seconds, key=seconds.__getitem__, reverse=True):
        line(part, seconds[part], [o for o in steps[-1] if o.part == part])
    line(BETWEEN, whole - sum(seconds.values()), [])
    line("step", whole, steps[-1])
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
