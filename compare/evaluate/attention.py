"""Attention heads: mean distance, entropy, weight on the first token, induction.

Shapes: B windows, T tokens, H heads.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/attention.yaml. Raises ValueError for invalid values."""

    split: str | None
    num_windows: int

    def __post_init__(self) -> None:
        at_least(1, self, "num_windows")
        check_split(self.split)


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR,... eval=attention`."""
    folders = tracked(selector.runs, "reading attention")
    return publish("attention", selector, (measure(selector, run, options) for run in folders))


def measure(selector: RunSelector, folder: Path, options: Options) -> tuple[Path, Config]:
    """Readouts of every head, on text and on random tokens that are repeated once."""
    run = selector.load(folder)
    for attention in run.model.attention_layers:
        if not attention.has_weights:
            raise ValueError(f"run={folder}: {type(attention).__name__} has no attention weights")
    text = open_text(run, options.split, selector.data, selector.data_name)
    length = min(run.model.shape.max_len, len(text.tokens))
    starts = torch.linspace(0, len(text.tokens) - length, options.num_windows).long()
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
        "repeated_tokens": {"length": repeated.size(1) // 2, "first": first, "again": again},
    }


def random_repeats(run: LoadedRun, rows: int) -> Tensor:
    """Random tokens, each half of a row the same: (B, T)."""
    vocab_size, length = run.tokenizer.get_vocab_size(), run.model.shape.max_len
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(vocab_size, (rows, max(1, length // 2)), generator=generator)
    return torch.cat((once, once), dim=1)


@dataclass
class LayerReadouts:
    """Sums over the queries in the later half of each window, by head (H,)."""

    half: int  # queries before it have few keys to choose from
    sums: dict[str, Tensor] = field(default_factory=dict)
    queries: int = 0

    def add(self, weights: Tensor, pos: Tensor) -> None:
        """Add attention weights (B, H, T, T) of tokens at positions (T,)."""
        late = pos >= self.half
        weights, distance = weights[:, :, late], (pos[late, None] - pos).float()
        self.queries += weights.size(0) * weights.size(2)
        terms = {
            "distance": weights * distance,
            "entropy": torch.special.entr(weights),
            "first": weights * (pos == 0),
            "induction": weights * (distance == self.half - 1),  # after the same token before
        }
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term.sum(dim=(0, 2, 3)).double().cpu()

    @property
    def means(self) -> dict[str, list[float]]:
        """Means over queries, one number per head."""
        return {name: (total / self.queries).tolist() for name, total in self.sums.items()}


@torch.no_grad()
def head_readouts(run: LoadedRun, windows: Tensor) -> list[dict[str, list[float]]]:
    """The mean readouts of each layer's heads over windows (B, T)."""
    layers = [LayerReadouts(windows.size(1) // 2) for _ in run.model.attention_layers]

    def observe(layer: LayerReadouts) -> Callable[[Attention, tuple[Tensor, Positions]], None]:
        def add(attention: Attention, inputs: tuple[Tensor, Positions]) -> None:
            x, positions = inputs[:2]
            layer.add(attention.weights(x, positions), positions.pos)

        return add

    pairs = zip(run.model.attention_layers, layers, strict=True)
    hooks = [attention.register_forward_pre_hook(observe(layer)) for attention, layer in pairs]
    try:
        with run.device.autocast():
            for window in windows.split(1):
                run.model(window.to(run.device.name))
    finally:
        for hook in hooks:
            hook.remove()
    return [layer.means for layer in layers]


@torch.no_grad()
def repeat_losses(run: LoadedRun, repeated: Tensor) -> tuple[float, float]:
    """Nats per token on the first of two equal halves (B, T), and on the second."""
    half = repeated.size(1) // 2
    with run.device.autocast():
        logits = run.model(repeated.to(run.device.name))[:, :-1].float()
    nats = F.cross_entropy(logits.mT, repeated[:, 1:].to(run.device.name), reduction="none")
    return nats[:, : half - 1].mean().item(), nats[:, half:].mean().item()


def uniform_readouts(length: int) -> dict[str, float]:
    """The readouts of attention that is uniform over all visible keys."""
    keys = torch.arange(length // 2, length).double() + 1  # visible to each query of later half
    share = (1 / keys).mean().item()
    return {
        "distance": ((keys - 1) / 2).mean().item(),
        "entropy": keys.log().mean().item(),
        "first": share,
        "induction": share,
    }
