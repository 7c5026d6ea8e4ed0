"""How far positions reach: perplexity at other contexts than that of training, and by position."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compare.evaluate.dataset import SPLITS, Text, open_text
from compare.evaluate.load import Opened, Opening
from compare.evaluate.publish import publish
from model.likelihood import perplexity, token_nats
from train.config.compose import choices_of, compose
from train.config.schema import Config, at_least, choose
from train.record.terminal import tracked

FIRST = 16  # tokens of the first bucket of positions; each further one is as long as all before it


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/length.yaml. Raises ValueError for what cannot be asked."""

    contexts: list[float]
    scalings: list[str]
    split: str | None
    batch_size: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")
        if not self.contexts or min(self.contexts) <= 0:
            raise ValueError(f"contexts={self.contexts} must be numbers above 0")
        if self.split is not None:
            choose("split", self.split, dict.fromkeys(SPLITS))
        for name in self.scalings:
            choose("scalings", name, dict.fromkeys(choices_of("pos")))


def evaluate(opening: Opening, options: Options) -> int:
    """`python eval.py run=DIR,... eval=length`."""
    return publish("length", opening, (measure(opening, run, options) for run in opening.runs))


def measure(opening: Opening, folder: Path, options: Options) -> tuple[Path, Config]:
    """Perplexities of a run by scheme and context, None where the scheme is not defined."""
    run = opening.open(folder)
    text = open_text(run, options.split, opening.data, opening.data_name)
    schemes = list(schemes_of(opening, run, options))
    rows, positions = [], {}
    for scheme, factor, context in tracked(schemes, f"{folder.name}: {len(schemes)} contexts"):
        used = run if factor is None else scaled(opening, folder, scheme, factor)
        nats = score(used, text, context, options)
        rows.append(row(scheme, factor, context, nats))
        if nats is not None:
            positions[scheme] = by_position(nats, context)  # of the longest context stays
    trained = run.model.shape.max_len
    return folder, {
        "step": run.step,
        "split": text.name,
        "dtype": run.device.dtype_name,
        "trained_context": trained,
        "tokens": len(text.tokens) - 1,
        "rows": rows,
        "positions": positions,
        **text.identity,
    }


def schemes_of(
    opening: Opening, run: Opened, options: Options
) -> Iterator[tuple[str, float | None, int]]:
    """What to score: scheme, factor (None: as it is) and context in tokens."""
    trained, own = run.model.shape.max_len, run.config["choices"]["pos"]
    contexts = sorted({max(1, round(times * trained)) for times in options.contexts})
    yield from ((own, None, context) for context in contexts)
    if own == "rope":
        for scheme in options.scalings:
            yield from ((scheme, c / trained, c) for c in contexts if c > trained)


def scaled(opening: Opening, folder: Path, scheme: str, factor: float) -> Opened:
    """A run with its rotary positions scaled."""
    node = compose(["run=none", f"pos={scheme}", f"pos.factor={factor}"], door="eval")["pos"]
    given = frozenset({"factor"})
    return replace(opening, pos=node, pos_name=scheme, given=given).open(folder)


def score(run: Opened, text: Text, context: int, options: Options) -> Tensor | None:
    """Nats of each token but the first, in windows without overlap; None where it is not defined."""
    shape, end = run.model.shape, run.model.position.max_len
    if end is not None and context > end:
        return None
    rows = options.batch_size or int(run.config["eval_batch_size"])
    with run.device.autocast():
        return token_nats(
            run.model,
            text.tokens,
            context=context,
            stride=context,
            batch_size=max(1, rows * shape.max_len // context),
            device=run.device.name,
        )


def row(scheme: str, factor: float | None, context: int, nats: Tensor | None) -> dict[str, Any]:
    loss = None if nats is None else nats.double().mean().item()
    found = None if loss is None else perplexity(loss)
    return {
        "pos": scheme,
        "factor": factor,
        "context": context,
        "loss": loss,
        "perplexity": found,
        "windows": None if nats is None else -(-len(nats) // context),
    }


def by_position(nats: Tensor, context: int) -> list[dict[str, Any]]:
    """Mean loss of the tokens that so many others stand before in their window, by bucket."""
    before = torch.arange(len(nats)) % context
    buckets = []
    start, end = 0, min(FIRST, context)
    while start < context:
        inside = nats[(before >= start) & (before < end)]
        if len(inside):
            loss = inside.double().mean().item()
            buckets.append({"start": start, "end": end, "tokens": len(inside), "loss": loss})
        start, end = end, min(2 * end, context)
    return buckets
