"""What a checkpoint is worth: its perplexity on every token of a text."""

import dataclasses
import math
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compare.evaluate.bigram import bigram_nats
from compare.evaluate.dataset import SPLITS, Text, open_text
from compare.evaluate.load import Opened, Opening
from compare.report.statistics import ratio_interval
from model.likelihood import bits_per_byte, perplexity, token_nats
from train.config.schema import at_least, choose
from train.record.terminal import tracked


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/perplexity.yaml. Raises ValueError for what cannot be asked."""

    split: str | None
    context: int | None
    stride: int | None
    batch_size: int | None
    against: str | None
    bigram: bool

    def __post_init__(self) -> None:
        at_least(1, self, "context", "stride", "batch_size")
        if self.split is not None:
            choose("split", self.split, dict.fromkeys(SPLITS))


@dataclass(frozen=True)
class Scored:
    """A text as one run predicts it."""

    run: Opened
    text: Text
    context: int
    stride: int
    nats: Tensor  # of each token but the first, (N - 1,)

    @property
    def total(self) -> float:
        return self.nats.sum(dtype=torch.float64).item()

    @property
    def loss(self) -> float:
        return self.total / len(self.nats)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.total, self.text.scored_bytes)

    def sums(self) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        """What a bootstrap resamples, and the nats, tokens and bytes of each unit."""
        kind, unit, sizes = self.text.units()
        nats = np.bincount(unit, self.nats.double().numpy(), len(sizes))
        return kind, nats, np.bincount(unit, minlength=len(sizes)), sizes


def evaluate(opening: Opening, options: Options) -> int:
    """`python eval.py run=DIR`."""
    run = opening.open(opening.only)
    text = open_text(run, options.split, opening.data, opening.data_name)
    scored = score_text(run, text, options)
    result = described(scored)
    if options.bigram:
        training = open_text(run, "train", None, None).tokens
        pairs = bigram_nats(training, text.tokens, run.model.shape.vocab_size)
        result["bigram_perplexity"] = perplexity(pairs / len(scored.nats))
    if options.against is not None:
        other = dataclasses.replace(opening, pos=None).open(Path(options.against))
        rival = score_text(other, text.in_tokens_of(other), options)
        result["against"] = described(rival) | difference(scored, rival)
    return run.answer(file_name(scored, opening), result, told(result))


def score_text(run: Opened, text: Text, options: Options) -> Scored:
    """Score a text as asked. Raises ValueError for a context that the run does not reach."""
    context = options.context or run.model.shape.max_len
    run.check_context(context)
    stride = options.stride or context
    rows = options.batch_size or run.config["eval_batch_size"]
    windows = -(-len(text.tokens) // (stride * rows))
    beats = iter(tracked(range(windows), f"scoring {len(text.tokens):,} tokens"))
    with run.device.autocast():
        nats = token_nats(
            run.model,
            text.tokens,
            context=context,
            stride=stride,
            batch_size=rows,
            device=run.device.name,
            between=lambda: next(beats, None),
        )
    deque(beats, maxlen=0)
    return Scored(run, text, context, stride, nats)


def described(scored: Scored) -> dict[str, Any]:
    """All that was asked and found, for JSON."""
    run, config = scored.run, scored.run.config
    kind, nats, tokens, sizes = scored.sums()
    low, high = ratio_interval(nats, tokens) if len(nats) > 1 else (None, None)
    bits = [end and end * tokens.sum() / sizes.sum() / math.log(2) for end in (low, high)]
    if kind == "documents":
        bits = list(ratio_interval(nats / math.log(2), sizes))
    return {
        "run": str(run.folder),
        "step": run.step,
        "split": scored.text.name,
        "context": scored.context,
        "stride": scored.stride,
        "dtype": run.device.dtype_name,
        "pos": config["choices"]["pos"],
        "pos_options": {k: v for k, v in config["pos"].items() if not k.startswith("_")},
        "tokens": len(scored.nats),
        "bytes": scored.text.scored_bytes,
        "nats": scored.total,
        "loss": scored.loss,
        "perplexity": perplexity(scored.loss),
        "perplexity_interval": [end if end is None else perplexity(end) for end in (low, high)],
        "bits_per_byte": scored.bits_per_byte,
        "bits_per_byte_interval": bits,
        "resampled": f"{len(nats)} {kind}",
        **scored.text.identity,
    }


def difference(mine: Scored, theirs: Scored) -> dict[str, Any]:
    """How much better or worse than another run on the same text, mine minus theirs.

    Perplexities compare on the same tokens alone; bits per byte always.
    """
    kind, nats, tokens, sizes = mine.sums()
    other_kind, other_nats, _, other_sizes = theirs.sums()
    same = mine.text.identity == theirs.text.identity
    found: dict[str, Any] = {
        "same_tokens": same,
        "loss_difference": None,
        "loss_difference_interval": None,
        "perplexity_ratio": None,
        "perplexity_ratio_interval": None,
        "bits_per_byte_difference": mine.bits_per_byte - theirs.bits_per_byte,
        "bits_per_byte_difference_interval": None,
        "trained_on_the_same_text": mine.run.trained_on == theirs.run.trained_on,
    }
    if same:
        interval = ratio_interval(nats - other_nats, tokens)
        found["loss_difference"] = mine.loss - theirs.loss
        found["loss_difference_interval"] = list(interval)
        found["perplexity_ratio"] = math.exp(mine.loss - theirs.loss)
        found["perplexity_ratio_interval"] = [math.exp(end) for end in interval]
    if kind == other_kind == "documents" or same:
        bits = (nats / sizes.sum() - other_nats / other_sizes.sum()) / math.log(2)
        scale = sizes / sizes.sum()
        found["bits_per_byte_difference_interval"] = list(ratio_interval(bits, scale))
    return found


def file_name(scored: Scored, opening: Opening) -> str:
    """Says what was asked, so that no answer overwrites that of another question."""
    words = [scored.text.name, f"step{scored.run.step}", f"context{scored.context}"]
    words += [f"stride{scored.stride}"] if scored.stride != scored.context else []
    words.append(scored.run.device.dtype_name)
    if opening.pos is not None:
        own = scored.run.config["pos"].items()
        keys = (f"-{key}-{value}" for key, value in own if not key.startswith("_"))
        words.append(f"{opening.pos_name}{''.join(keys)}")
    return "_".join(words)


def told(result: dict[str, Any]) -> str:
    """A result for people."""

    def within(key: str, style: str) -> str:
        low, high = result[f"{key}_interval"]
        between = "" if low is None else f"  ({low:{style}} to {high:{style}})"
        return f"{result[key]:{style}}{between}"

    rows = {
        "text": f"{result['split']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes",
        "context": f"{result['context']:,}, windows every {result['stride']:,}",
        "perplexity": within("perplexity", ".3f"),
        "bits per byte": within("bits_per_byte", ".4f"),
    }
    if "bigram_perplexity" in result:
        rows["bigram model"] = f"{result['bigram_perplexity']:.3f}"
    lines = [f"  {name:<14} {value}" for name, value in rows.items()]
    lines.append(f"  95 % intervals from {result['resampled']}, resampled")
    if other := result.get("against"):
        lines += ["", f"against {other['run']} (step {other['step']})", *told_difference(other)]
    return "\n".join(lines)


def told_difference(other: dict[str, Any]) -> list[str]:
    """Lines on how a run did against another."""
    lines = []
    if other["same_tokens"]:
        low, high = (100 * (end - 1) for end in other["perplexity_ratio_interval"])
        verdict = "" if low > 0 or high < 0 else ", inside the noise of the text"
        lines.append(
            f"  perplexity     {100 * (other['perplexity_ratio'] - 1):+.2f} %  "
            f"({low:+.2f} to {high:+.2f}{verdict}), theirs {other['perplexity']:.3f}"
        )
    else:
        lines.append("  perplexity     not compared: the tokenizers differ")
    interval = other["bits_per_byte_difference_interval"]
    between = "" if interval is None else "  ({:+.4f} to {:+.4f})".format(*interval)
    lines.append(
        f"  bits per byte  {other['bits_per_byte_difference']:+.4f}{between}, "
        f"theirs {other['bits_per_byte']:.4f}"
    )
    if not other["trained_on_the_same_text"]:
        lines.append(
            "  It was trained on another text, or another split: it may have seen this one."
        )
    return lines
