"""Attention heads: mean distance, entropy, weight on the first token, induction, and their pictures.

Shapes: B windows, T tokens, Q queries, H heads, C cells of a map.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from compare.evaluate.dataset import check_split, open_text
from compare.evaluate.load import LoadedRun, RunSelector
from compare.evaluate.publish import publish
from model.attention.base import Attention
from model.position.base import Positions
from train.config.schema import Config, at_least
from train.record.terminal import tracked

HELD = 0.9  # of a query's weight
CELLS = 64  # most rows and columns of a map: longer contexts are pooled


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/attention.yaml. Raises ValueError for invalid values."""

    split: str | None
    num_windows: int
    maps: int

    def __post_init__(self) -> None:
        at_least(1, self, "num_windows")
        at_least(0, self, "maps")
        if self.maps > self.num_windows:
            raise ValueError(f"maps={self.maps} must be at most num_windows={self.num_windows}")
        check_split(self.split)


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR,... eval=attention`."""
    folders = tracked(selector.runs, "reading attention")
    answers = (measure(selector, run, options) for run in folders)
    return publish("attention", selector, answers, "attention_distance", "attention_maps")


def measure(selector: RunSelector, folder: Path, options: Options) -> tuple[Path, Config]:
    """Readouts of every head, on text and on random tokens that are repeated once."""
    run = selector.load(folder, allow_untrained=True)
    if run.model.has_latents:
        raise ValueError(f"run={folder}: not every token passes every layer, so no map is square")
    if run.model.prompt_tokens or any(a.prefix is not None for a in run.model.attention_layers):
        raise ValueError(
            f"run={folder}: its heads also look at what is no text, a prompt or a prefix"
        )
    for attention in run.model.attention_layers:
        if not attention.has_weights:
            raise ValueError(f"run={folder}: {type(attention).__name__} has no attention weights")
    text = open_text(run, options.split, selector.data, selector.data_name)
    length = min(run.model.shape.max_len, len(text.tokens))
    starts = torch.linspace(
        0, len(text.tokens) - length, options.num_windows, dtype=torch.float64
    ).long()
    windows = text.tokens[starts[:, None] + torch.arange(length)].long()  # (B, T)
    repeated = random_repeats(run, options.num_windows)
    layers = head_readouts(run, windows)
    for layer, on_repeats in zip(layers, head_readouts(run, repeated), strict=True):
        layer["induction"] = on_repeats["induction"]
    first, again = repeat_losses(run, repeated)
    return folder, {
        "step": run.step,
        "split": text.name,
        "num_windows": options.num_windows,
        "context": length,
        "layers": layers,
        "even": uniform_readouts(length),
        "distances": distance_names(length),
        "maps": [m.means for m in head_maps(run, windows[: options.maps])] if options.maps else [],
        "repeated_tokens": {"length": repeated.size(1) // 2, "first": first, "again": again},
    }


def random_repeats(run: LoadedRun, rows: int) -> Tensor:
    """Random tokens, each half of a row the same: (B, T)."""
    vocab_size, length = run.tokenizer.get_vocab_size(), run.model.shape.max_len
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(vocab_size, (rows, max(1, length // 2)), generator=generator)
    return torch.cat((once, once), dim=1)


def distance_starts(length: int) -> list[int]:
    """The distances that begin a bucket: 0, 1, 2, 4, 8, ... below a length in tokens."""
    return [0, *(2**i for i in range((length - 1).bit_length()))]


def distance_names(length: int) -> list[str]:
    """The buckets of distances below a length: 0, 1, 2-3, 4-7, ..."""
    starts = distance_starts(length)
    ends = [*starts[1:], length]
    return [
        f"{first}-{end - 1}" if end - first > 1 else f"{first}"
        for first, end in zip(starts, ends, strict=True)
    ]


def by_distance(weights: Tensor, distance: Tensor, length: int) -> Tensor:
    """Weights (..., T) on keys at distances (..., T), summed over each bucket below a length."""
    edges = torch.tensor(distance_starts(length)[1:], device=distance.device)
    bucket = torch.bucketize(distance, edges, right=True)  # 0 for keys ahead: they weigh nothing
    one_hot = F.one_hot(bucket, len(edges) + 1).to(weights.dtype)
    return torch.einsum("...qt,qtb->...qb", weights, one_hot)


def keys_held(weights: Tensor, share: float = HELD) -> Tensor:
    """The fewest keys that hold a share of a query's weights (..., T), the last one in part: (...).

    Of uniform attention over n keys, share * n.
    """
    largest = weights.sort(dim=-1, descending=True).values
    missing = share - (largest.cumsum(dim=-1) - largest)  # before each key
    tiny = torch.finfo(weights.dtype).tiny
    return (missing / largest.clamp_min(tiny)).clamp(0, 1).sum(dim=-1)


class Reader(Protocol):
    """What takes the attention weights of a layer, window by window."""

    def add(self, weights: Tensor, pos: Tensor) -> None:
        """Take attention weights (B, H, T, T) of tokens at positions (T,)."""


@dataclass
class LayerReadouts:
    """Sums over the queries in the later half of each window, by head (H, ...)."""

    half: int  # queries before it have few keys to choose from
    sums: dict[str, Tensor] = field(default_factory=dict)
    queries: int = 0

    def add(self, weights: Tensor, pos: Tensor) -> None:
        late = pos >= self.half
        weights, distance = weights[:, :, late], pos[late, None] - pos  # (B, H, Q, T), (Q, T)
        self.queries += weights.size(0) * weights.size(2)
        terms = {
            "distance": (weights * distance).sum(dim=3),
            "entropy": torch.special.entr(weights).sum(dim=3),
            "first": weights[..., 0],
            "induction": (weights * (distance == self.half - 1)).sum(dim=3),  # on what came after
            "keys_held": keys_held(weights) / (pos[late] + 1),  # of those visible
            "mass": by_distance(weights, distance, len(pos)),
        }
        for name, term in terms.items():  # (B, H, Q, ...)
            self.sums[name] = self.sums.get(name, 0) + term.sum(dim=(0, 2)).cpu().double()

    @property
    def means(self) -> dict[str, list[float]]:
        """Means over queries: one number per head, of `mass` a list of one per bucket."""
        return {name: (total / self.queries).tolist() for name, total in self.sums.items()}


@dataclass
class LayerMap:
    """The mean attention matrix of each head, pooled to at most CELLS rows and columns."""

    total: Tensor | float = 0.0  # (H, C, C)
    windows: int = 0

    def add(self, weights: Tensor, pos: Tensor) -> None:
        T = weights.size(3)
        cells = min(T, CELLS)
        cell = F.one_hot(torch.arange(T, device=pos.device) * cells // T, cells).float()  # (T, C)
        queries = cell / cell.sum(dim=0)  # their mean; of keys the sum, so that rows sum to 1
        self.total = self.total + torch.einsum("bhqt,qc,td->hcd", weights, queries, cell).cpu()
        self.windows += weights.size(0)

    @property
    def means(self) -> list[list[list[float]]]:
        """Weight by head, cell of queries and cell of keys, to four digits."""
        assert isinstance(self.total, Tensor)
        heads = (self.total / self.windows).tolist()
        return [[[round(x, 4) for x in row] for row in head] for head in heads]


def head_readouts(run: LoadedRun, windows: Tensor) -> list[dict[str, list[float]]]:
    """The mean readouts of each layer's heads over windows (B, T)."""
    readers = [LayerReadouts(windows.size(1) // 2) for _ in run.model.attention_layers]
    return [layer.means for layer in read_attention(run, windows, readers)]


def head_maps(run: LoadedRun, windows: Tensor) -> list[LayerMap]:
    """The mean attention matrices of each layer's heads over windows (B, T)."""
    return read_attention(run, windows, [LayerMap() for _ in run.model.attention_layers])


R = TypeVar("R", bound=Reader)


@torch.no_grad()
def read_attention(run: LoadedRun, windows: Tensor, readers: list[R]) -> list[R]:
    """Have a reader per layer take its attention weights over windows (B, T), one by one."""

    def observe(reader: Reader) -> Callable[[Attention, tuple[Tensor, Positions]], None]:
        def add(attention: Attention, inputs: tuple[Tensor, Positions]) -> None:
            x, positions = inputs[:2]
            reader.add(attention.weights(x, positions), positions.pos)

        return add

    pairs = zip(run.model.attention_layers, readers, strict=True)
    hooks = [attention.register_forward_pre_hook(observe(reader)) for attention, reader in pairs]
    try:
        with run.device.autocast():
            for window in windows.split(1):
                run.model(window.to(run.device.name))
    finally:
        for hook in hooks:
            hook.remove()
    return readers


@torch.no_grad()
def repeat_losses(run: LoadedRun, repeated: Tensor) -> tuple[float, float]:
    """Nats per token on the first of two equal halves (B, T), and on the second."""
    half = repeated.size(1) // 2
    with run.device.autocast():
        logits = run.model(repeated.to(run.device.name))[:, :-1].float()
    nats = F.cross_entropy(logits.mT, repeated[:, 1:].to(run.device.name), reduction="none")
    return nats[:, : half - 1].mean().item(), nats[:, half:].mean().item()


def uniform_readouts(length: int) -> dict[str, float | list[float]]:
    """The readouts of attention that is uniform over all visible keys."""
    pos = torch.arange(length)
    distance = pos[length // 2 :, None] - pos  # (Q, T), queries of the later half
    keys = pos[length // 2 :].double() + 1  # visible to each
    weights = (distance >= 0) / keys[:, None]
    share = (1 / keys).mean().item()
    return {
        "distance": ((keys - 1) / 2).mean().item(),
        "entropy": keys.log().mean().item(),
        "first": share,
        "induction": share,
        "keys_held": HELD,
        "mass": by_distance(weights, distance, length).mean(dim=0).tolist(),
    }
