"""What the heads of a model look at: the why behind a difference in perplexity.

Shapes: B windows, T tokens of each, H heads, S keys.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compare.evaluate.dataset import SPLITS, open_text
from compare.evaluate.load import Opened, Opening
from compare.evaluate.publish import publish
from model.attention.attend import watched
from train.config.schema import Config, at_least, choose
from train.record.terminal import tracked


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/attention.yaml. Raises ValueError for what cannot be asked."""

    split: str | None
    rows: int

    def __post_init__(self) -> None:
        at_least(1, self, "rows")
        if self.split is not None:
            choose("split", self.split, dict.fromkeys(SPLITS))


def evaluate(opening: Opening, options: Options) -> int:
    """`python eval.py run=DIR,... eval=attention`."""
    folders = tracked(opening.runs, "reading attention")
    return publish("attention", opening, (measure(opening, run, options) for run in folders))


def measure(opening: Opening, folder: Path, options: Options) -> tuple[Path, Config]:
    """The readouts of every head, of text and of random tokens that are repeated."""
    run = opening.open(folder)
    text = open_text(run, options.split, opening.data, opening.data_name)
    length = min(run.model.shape.max_len, len(text.tokens))
    starts = torch.linspace(0, len(text.tokens) - length, options.rows).long()
    windows = text.tokens[starts[:, None] + torch.arange(length)].long()  # (B, T)
    repeated = random_repeats(run, options.rows)
    looks, copies = look(run, windows), look(run, repeated)
    induction = [layer.pop("induction") for layer in copies]
    heads = [layer | {"induction": own} for layer, own in zip(looks, induction, strict=True)]
    first, second = losses(run, repeated)
    return folder, {
        "step": run.step,
        "split": text.name,
        "rows": options.rows,
        "context": length,
        "layers": heads,
        "even": even(length),
        "repeated_tokens": {"length": repeated.size(1) // 2, "first": first, "again": second},
    }


def random_repeats(run: Opened, rows: int) -> Tensor:
    """Random tokens, twice in a row: (B, T), half of T new."""
    shape, codec = run.model.shape, run.tokenizer.get_vocab_size()
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(codec, (rows, max(1, shape.max_len // 2)), generator=generator)
    return torch.cat((once, once), dim=1)


@dataclass
class Looks:
    """What the queries of one layer look at, summed over them, by head (H,)."""

    half: int  # queries before it have too little to choose from
    sums: dict[str, Tensor] = field(default_factory=dict)
    queries: int = 0

    def add(self, weights: Tensor, q_pos: Tensor, k_pos: Tensor) -> None:
        """Take in weights (B, H, T, S)."""
        late = q_pos >= self.half
        weights, distance = weights[:, :, late], (q_pos[late, None] - k_pos).float()
        self.queries += weights.size(0) * weights.size(2)
        found = {
            "distance": weights * distance,
            "entropy": torch.special.entr(weights),
            "first": weights * (k_pos == 0),
            "induction": weights * (distance == self.half - 1),
        }
        for name, part in found.items():
            self.sums[name] = self.sums.get(name, 0) + part.sum(dim=(0, 2, 3)).double().cpu()

    @property
    def means(self) -> dict[str, list[float]]:
        """Means over queries, a number for each head."""
        return {name: (total / self.queries).tolist() for name, total in self.sums.items()}


@torch.no_grad()
def look(run: Opened, windows: Tensor) -> list[dict[str, list[float]]]:
    """For each layer, what the later half of the queries in windows (B, T) looks at."""
    layers = [Looks(windows.size(1) // 2) for _ in run.model.blocks]
    current: list[Looks] = []

    def enter(layer: Looks) -> Any:
        return lambda *_: current.__setitem__(slice(None), [layer])

    blocks = zip(run.model.blocks, layers, strict=True)
    hooks = [block.register_forward_pre_hook(enter(layer)) for block, layer in blocks]
    try:
        with watched(lambda *seen: current[0].add(*seen)), run.device.autocast():
            for window in windows.split(1):
                run.model(window.to(run.device.name))
    finally:
        for hook in hooks:
            hook.remove()
    return [layer.means for layer in layers]


@torch.no_grad()
def losses(run: Opened, repeated: Tensor) -> tuple[float, float]:
    """Nats a token on the first of two equal halves (B, T), and on the second."""
    half = repeated.size(1) // 2
    with run.device.autocast():
        logits = run.model(repeated.to(run.device.name))[:, :-1].float()
    nats = F.cross_entropy(logits.mT, repeated[:, 1:].to(run.device.name), reduction="none")
    return nats[:, : half - 1].mean().item(), nats[:, half:].mean().item()


def even(length: int) -> dict[str, float]:
    """The readouts of attention that spreads evenly over all keys, for the later half of queries."""
    keys = torch.arange(length // 2, length).double() + 1
    once = (1 / keys).mean().item()
    return {
        "distance": ((keys - 1) / 2).mean().item(),
        "entropy": keys.log().mean().item(),
        "first": once,
        "induction": once,
    }
