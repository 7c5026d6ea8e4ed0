"""Time of a training step by kind of operation, and how near its products are to the device's limit."""

import statistics
import sys
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.step_time import VOCAB, successive
from cli.entry import run_command
from train.config.compose import compose
from train.measure import device as devices
from train.measure.device import Device
from train.measure.timer import ROUNDS, interleave, matmul_flops_per_second
from train.optim.optimizer import Optimizer
from train.record.terminal import columns
from train.setup.run_setup import check
from train.step import TrainStep
from train.step_estimate import random_token_step

USAGE = """\
The time of a training step by kind of operation: medians of 7 steps on random tokens, with every
operation timed, and the FLOP/s of matrix products as a share of those of one large product.
"between operations" is the rest of an unprofiled step; on a busy machine it can be negative.

  python -m bench.op_breakdown [KEY=VALUE ...]

KEY=VALUE are keys of train.py, for example model=shakespeare attn=gqa batch_size=64.
"""
OPTIMIZER, OTHER, BETWEEN = "optimizer, clipping", "other operations", "between operations"

#: Kinds of torch's operations, by the beginnings of their names; the first match counts.
KINDS = {
    "products with weights": ("mm", "addmm"),
    "attention's products": ("bmm", "baddbmm", "_scaled_dot_product"),
    "softmax": ("_softmax", "_log_softmax"),
    "activation": ("gelu", "relu", "threshold_backward", "silu", "pow"),
    "norms": ("native_layer_norm", "linalg_vector_norm", "rsqrt", "_fused_rms_norm"),
    "copies and casts": ("_to_copy", "clone", "copy", "cat", "repeat"),
    "sums and factors": ("add", "sub", "mul", "div", "neg", "sum"),
    "random numbers": ("random", "bernoulli", "native_dropout"),
    OPTIMIZER: ("_foreach",),  # and all operations of the optimizer's step
}


@dataclass(frozen=True)
class Operation:
    """One call of one of torch's operations."""

    kind: str
    seconds: float
    flops: int


class OperationTimer(TorchDispatchMode):
    """Context that synchronises after every operation and records it."""

    def __init__(self, device: Device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device
        self.operations: list[Operation] = []
        self.stepping = False  # the optimizer is running

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        start = perf_counter()
        out = func(*args, **kwargs)
        self.device.synchronize()
        seconds = perf_counter() - start
        operation = func.overloadpacket
        kind = OPTIMIZER if self.stepping else kind_of(operation.__name__)
        count = flop_registry.get(operation, lambda *_, **__: 0)
        self.operations.append(Operation(kind, seconds, count(*args, **kwargs, out_val=out)))
        return out


def kind_of(operation: str) -> str:
    return next((kind for kind, names in KINDS.items() if operation.startswith(names)), OTHER)


def main(arguments: list[str]) -> int:
    """`python -m bench.op_breakdown`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    config = compose(arguments)
    if config["compile"] is True:
        raise ValueError("compile=true fuses operations; set compile=false")
    spec = check(config)
    devices.set_up_process(spec.settings.threads, spec.settings.tf32)
    step = random_token_step(config | {"compile": False}, VOCAB)
    whole, steps = measure(step)
    print(columns(table(whole, steps, matmul_flops_per_second(step.device))))
    return 0


class TimedOptimizer(Optimizer):
    """An optimizer that tells a timer when it is running."""

    def __init__(self, step: TrainStep, timer: OperationTimer) -> None:
        super().__init__(step.model, step.optimizer.optimizers)
        self.timer = timer

    def step(self, lr: float, unless: Tensor | None = None) -> None:
        self.timer.stepping = True
        super().step(lr, unless)
        self.timer.stepping = False


def measure(step: TrainStep) -> tuple[float, list[list[Operation]]]:
    """Seconds of an unprofiled step, and the operations of profiled ones, interleaved."""
    timer, steps = OperationTimer(step.device), list[list[Operation]]()
    inner = successive(replace(step, optimizer=TimedOptimizer(step, timer)))

    def profiled() -> None:
        timer.operations = []
        with timer:
            inner()
        steps.append(timer.operations)

    times = interleave({"plain": successive(step), "profiled": profiled}, step.device, ROUNDS)
    return statistics.median(times["plain"]), steps[-ROUNDS:]


def table(whole: float, steps: list[list[Operation]], ceiling: float) -> list[list[str]]:
    """A row for each kind of operation, the longest first, then the rest of the whole step."""
    seconds = {
        kind: statistics.median(sum(o.seconds for o in step if o.kind == kind) for step in steps)
        for kind in {o.kind for o in steps[-1]}
    }
    lines = [["operations", "calls", "ms", "of the step", "GFLOP", "of matmul's ceiling"]]

    def line(name: str, spent: float, operations: list[Operation]) -> None:
        flops = sum(o.flops for o in operations)
        lines.append(
            [
                name,
                f"{len(operations):,}" if operations else "-",
                f"{1e3 * spent:,.1f}",
                f"{spent / whole:.0%}",
                f"{flops / 1e9:,.1f}" if flops else "-",
                f"{flops / spent / ceiling:.0%}" if flops else "-",
            ]
        )

    for kind in sorted(seconds, key=seconds.__getitem__, reverse=True):
        line(kind, seconds[kind], [o for o in steps[-1] if o.kind == kind])
    line(BETWEEN, whole - sum(seconds.values()), [])
    line("step", whole, steps[-1])
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
