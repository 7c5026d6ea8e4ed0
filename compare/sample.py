"""Text from a checkpoint."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.tokenizer import decode, encode
from model.generate import generate
from train import device as devices
from train.cli import compose_door
from train.config import arguments
from train.job import at_least
from train.progress import printable
from train.run import open_model, trained_dtype

USAGE = """\
Let a finished run continue a prompt, with a KV cache.

  python sample.py run=DIR [KEY=VALUE ...]

Examples
  python sample.py run=outputs/runs/mine
  python sample.py run=outputs/runs/mine prompt="def main(" tokens=100
  python sample.py run=outputs/runs/mine temperature=0
  python sample.py run=outputs/runs/mine count=3 temperature=1 top_k=10 seed=7
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of sample.yaml. Raises ValueError for what cannot be asked."""

    run: str
    prompt: str | None
    tokens: int
    count: int
    temperature: float
    top_k: int | None
    seed: int
    checkpoint: str
    device: str
    dtype: str | None
    threads: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "tokens", "count", "top_k", "threads")
        at_least(0, self, "temperature", "seed")


def sample(overrides: list[str]) -> int:
    """`python sample.py`."""
    composed = compose_door(overrides, "sample", USAGE)
    if composed is None:
        return 0
    del composed["choices"]
    options = Options(**arguments("", composed, Options)[0])
    run = Path(options.run)
    device = devices.pick(options.device, options.dtype or trained_dtype(run), False)
    devices.set_up(options.threads)
    model, tokenizer, _, _ = open_model(run, device, options.checkpoint)
    prompt = encode(tokenizer, "\n" if options.prompt is None else options.prompt)
    generator = torch.Generator().manual_seed(options.seed)
    for number in range(options.count):
        with device.autocast():
            ids = generate(
                model,
                prompt,
                options.tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                generator=generator,
            )
        if number:
            print("-" * 40)
        print(printable(decode(tokenizer, [*prompt, *ids])))
    return 0
