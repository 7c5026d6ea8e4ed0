"""Efficiency of one run on many GPUs, by a model of its exchange: python -m bench.scaling."""

import sys
from dataclasses import dataclass

import torch

from cli.entry import run_command
from model.cost import count_parameters
from train.config.compose import compose
from train.config.schema import arguments
from train.record.terminal import columns
from train.setup.build import build_model

USAGE = """\
What share of n GPUs is not waiting, where each computes the same micro-batches as one does and the
gradients are summed after the backward pass. Nothing is measured here: it is arithmetic on what is given.

  python -m bench.scaling compute_ms=T [gpus_per_node=8] [inside=GB/s] [between=GB/s] [latency_us=L] [KEY=VALUE ...]

compute_ms is a step of one GPU on its own share, as a run's summary.json has it (step_ms); inside and
between are a GPU's bandwidth to the others of its machine, and to other machines. KEY=VALUE are keys of
train.py; they decide the number of parameters.

  B = 4 bytes for each parameter; g GPUs a machine, m machines, n = g m
  exchange = 2 (g - 1)/g B/inside + 2 (m - 1)/m (B/g)/between + 2 (g + m - 2) latency
  efficiency = compute / (compute + exchange)

Example
  python -m bench.scaling compute_ms=100 model=gpt2 data.path=README.md
"""
COUNTS = (1, 2, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True, kw_only=True)
class Network:
    """How GPUs are connected, and what one computes between two exchanges."""

    compute_ms: float
    gpus_per_node: int
    inside: float  # GB/s
    between: float
    latency_us: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0")

    def exchange_ms(self, size: int, gpus: int) -> float:
        """Time to sum so many bytes over so many GPUs: rings inside the machines, then between them."""
        g = min(gpus, self.gpus_per_node)
        m = -(-gpus // g)
        within = 2 * (g - 1) / g * size / (1e6 * self.inside)
        across = 2 * (m - 1) / m * (size / g) / (1e6 * self.between)
        return within + across + 2 * (g + m - 2) * self.latency_us / 1e3

    def efficiency(self, size: int, gpus: int) -> float:
        """The share of a step that is not exchange."""
        return self.compute_ms / (self.compute_ms + self.exchange_ms(size, gpus))


DEFAULTS = {"gpus_per_node": 8, "inside": 200.0, "between": 25.0, "latency_us": 10.0}


def main(overrides: list[str]) -> int:
    """`python -m bench.scaling`."""
    if {"-h", "--help"} & set(overrides) or not overrides:
        print(USAGE)
        return 0
    names = {"compute_ms", *DEFAULTS}
    own = [o for o in overrides if o.partition("=")[0] in names]
    given = {name: float(value) for name, _, value in (o.partition("=") for o in own)}
    (keys,) = arguments("", DEFAULTS | given, Network)
    network = Network(**keys)
    config = compose([o for o in overrides if o not in own])
    with torch.device("meta"):
        parameters, _ = count_parameters(build_model(config, 256))
    size = 4 * parameters
    print(f"{parameters:,} parameters; modelled, not measured")
    rows = [["GPUs", "exchange ms", "step ms", "efficiency"]]
    for gpus in COUNTS:
        exchange = network.exchange_ms(size, gpus)
        step = network.compute_ms + exchange
        share = f"{network.efficiency(size, gpus):.1%}"
        rows.append([f"{gpus:,}", f"{exchange:,.1f}", f"{step:,.1f}", share])
    print(columns(rows))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
