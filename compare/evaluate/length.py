"""Length extrapolation: perplexity at contexts other than the trained one, and loss by position."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compare.evaluate.dataset import check_split, open_text
from compare.evaluate.load import LoadedRun, RunSelector
from compare.evaluate.publish import publish
from model.loss import perplexity
from train.config.compose import choices_of, compose
from train.config.schema import Config, at_least, choose
from train.record.terminal import tracked

FIRST_BUCKET = 16  # positions; each further bucket is as long as all before it


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/length.yaml. Raises ValueError for invalid values."""

    contexts: list[float]
    scalings: list[str]
    split: str | None
    batch_size: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "batch_size")
        if not self.contexts or min(self.contexts) <= 0:
            raise ValueError(f"contexts={self.contexts} must be numbers above 0")
        check_split(self.split)
        for name in self.scalings:
            choose("scalings", name, dict.fromkeys(choices_of("pos")))


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR,... eval=length`."""
    return publish("length", selector, (measure(selector, run, options) for run in selector.runs))


def measure(selector: RunSelector, folder: Path, options: Options) -> tuple[Path, Config]:
    """Perplexities of a run by position scheme and context; None where a scheme is not defined."""
    run = selector.load(folder)
    text = open_text(run, options.split, selector.data, selector.data_name)
    tokens_at_once = run.batch_size(options.batch_size) * run.model.shape.max_len
    cells = list(cells_of(run, options))
    rows, positions = [], {}
    for scheme, factor, context in tracked(cells, f"{folder.name}: {len(cells)} contexts"):
        used = run if factor is None else load_scaled(selector, folder, scheme, factor)
        row = {"pos": scheme, "factor": factor, "context": context}
        row |= dict.fromkeys(("loss", "perplexity", "windows"))
        if used.reaches(context):
            batch_size = max(1, tokens_at_once // context)
            nats = used.score(text.tokens, context=context, stride=context, batch_size=batch_size)
            loss = nats.double().mean().item()
            stride = run.stride(context)
            windows = 1 + -(-max(0, len(nats) - context) // stride)
            row |= {"loss": loss, "perplexity": perplexity(loss), "windows": windows}
            if stride == context:  # else a window scores its last tokens alone
                positions[scheme] = by_position(nats, context)  # the longest context comes last
        rows.append(row)
    return folder, {
        "step": run.step,
        "split": text.name,
        "dtype": run.device.dtype_name,
        "trained_context": run.model.shape.max_len,
        "tokens": len(text.tokens) - 1,
        "rows": rows,
        "positions": positions,
        **text.identity,
    }


def cells_of(run: LoadedRun, options: Options) -> Iterator[tuple[str, float | None, int]]:
    """Position scheme, its factor (None: the run's own scheme) and context in tokens, to score."""
    trained, own = run.model.shape.max_len, run.config["choices"]["pos"]
    contexts = sorted({max(1, round(times * trained)) for times in options.contexts})
    yield from ((own, None, context) for context in contexts)
    if own == "rope":
        for scheme in options.scalings:
            yield from ((scheme, c / trained, c) for c in contexts if c > trained)


def load_scaled(selector: RunSelector, folder: Path, scheme: str, factor: float) -> LoadedRun:
    """A run with its rotary positions scaled."""
    pos = compose(["run=none", f"pos={scheme}", f"pos.factor={factor}"], door="eval")["pos"]
    scaled = replace(selector, pos=pos, pos_name=scheme, pos_keys=frozenset({"factor"}))
    return scaled.load(folder)


def by_position(nats: Tensor, context: int) -> list[dict[str, Any]]:
    """Mean loss by bucket of positions within the window."""
    position = torch.arange(len(nats)) % context
    buckets = []
    start, end = 0, min(FIRST_BUCKET, context)
    while start < context:
        inside = nats[(position >= start) & (position < end)]
        if len(inside):
            loss = inside.double().mean().item()
            buckets.append({"start": start, "end": end, "tokens": len(inside), "loss": loss})
        start, end = end, min(2 * end, context)
    return buckets
