"""Perplexity and bits per byte of a checkpoint, over every token of a text."""

import hashlib
import math
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compare.evaluate.bigram import bigram_nats
from compare.evaluate.dataset import EvaluationText, check_split, open_text
from compare.evaluate.load import LoadedRun, RunSelector
from compare.statistics.paired import ratio_interval
from model.loss import bits_per_byte, perplexity
from model.ops.nf4 import nf4
from train.config.schema import at_least, choose
from train.record.terminal import tracked

STORED = ("nf4",)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/perplexity.yaml. Raises ValueError for invalid values."""

    split: str | None
    context: int | None
    stride: int | None
    batch_size: int | None
    weights: str | None
    reference: str | None
    bigram: bool

    def __post_init__(self) -> None:
        at_least(1, self, "context", "stride", "batch_size")
        check_split(self.split)
        if self.weights is not None:
            choose("weights", self.weights, dict.fromkeys(STORED))


@dataclass(frozen=True)
class ScoredText:
    """A text with its negative log-likelihoods under one run."""

    run: LoadedRun
    text: EvaluationText
    context: int
    stride: int
    nats: Tensor  # (N - 1,), of each token but the first

    @property
    def total(self) -> float:
        """Nats of the whole text."""
        return self.nats.sum(dtype=torch.float64).item()

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.total / len(self.nats)

    @property
    def bits_per_byte(self) -> float:
        return bits_per_byte(self.total, self.text.scored_bytes)

    def sums(self) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
        """The kind of bootstrap unit, and the nats, tokens and bytes of each unit."""
        kind, unit, sizes = self.text.bootstrap_units()
        nats = np.bincount(unit, self.nats.double().numpy(), len(sizes))
        return kind, nats, np.bincount(unit, minlength=len(sizes)), sizes


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR`."""
    run = selector.load(selector.only)
    if options.weights is not None:
        store_weights(run)
    text = open_text(run, options.split, selector.data, selector.data_name)
    scored = score_text(run, text, options)
    answer = describe(scored) | {"weights": options.weights}
    if options.bigram:
        training = open_text(run, "train", None, None).tokens
        nats = bigram_nats(training, text.tokens, run.model.shape.vocab_size)
        answer["bigram_perplexity"] = perplexity(nats / len(scored.nats))
    if options.reference is not None:
        other = replace(selector, pos=None).load(Path(options.reference))
        reference = score_text(other, text.in_tokens_of(other), options)
        answer["reference"] = describe(reference) | comparison(scored, reference)
    return run.write_answer(file_name(scored, selector, options), answer, to_text(answer))


@torch.no_grad()
def store_weights(run: LoadedRun) -> None:
    """Store the matrices of a model's blocks in four bits, and compute with what comes back.

    But for what finetuning has added, which QLoRA keeps as it is.
    """
    for name, module in run.model.named_modules():
        frozen = f"{name}.weight" not in run.model.added
        if name.startswith("blocks.") and isinstance(module, nn.Linear) and frozen:
            module.weight.copy_(nf4(module.weight))


def score_text(run: LoadedRun, text: EvaluationText, options: Options) -> ScoredText:
    """Score a text. Raises ValueError for a context beyond the run's position scheme."""
    context, batch_size = run.context(options.context), run.batch_size(options.batch_size)
    stride = run.stride(options.stride or context)
    batches = -(-len(text.tokens) // (stride * batch_size))
    bar = iter(tracked(range(batches), f"scoring {len(text.tokens):,} tokens"))
    nats = run.score(
        text.tokens,
        context=context,
        stride=stride,
        batch_size=batch_size,
        on_batch=lambda: next(bar, None),
    )
    deque(bar, maxlen=0)  # to its end
    return ScoredText(run, text, context, stride, nats)


def describe(scored: ScoredText) -> dict[str, Any]:
    """The settings and the result, for JSON."""
    kind, nats, tokens, sizes = scored.sums()
    low, high = ratio_interval(nats, tokens) if len(nats) > 1 else (None, None)
    bits = [end and end * tokens.sum() / sizes.sum() / math.log(2) for end in (low, high)]
    if kind == "documents":
        bits = list(ratio_interval(nats / math.log(2), sizes))
    return {
        **scored.run.described,
        "split": scored.text.name,
        "context": scored.context,
        "stride": scored.stride,
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


def comparison(scored: ScoredText, reference: ScoredText) -> dict[str, Any]:
    """The differences from a reference run on the same text, for JSON.

    Perplexities are compared only on the same tokens, bits per byte always.
    """
    kind, nats, tokens, sizes = scored.sums()
    reference_kind, reference_nats, _, reference_sizes = reference.sums()
    same = scored.text.identity == reference.text.identity
    loss = interval = bits_interval = None
    if same:
        loss = scored.loss - reference.loss
        interval = list(ratio_interval(nats - reference_nats, tokens))
    if kind == reference_kind == "documents" or same:
        bits = (nats / sizes.sum() - reference_nats / reference_sizes.sum()) / math.log(2)
        bits_interval = list(ratio_interval(bits, sizes / sizes.sum()))
    return {
        "same_tokens": same,
        "loss_difference": loss,
        "loss_difference_interval": interval,
        "perplexity_ratio": None if loss is None else math.exp(loss),
        "perplexity_ratio_interval": interval and [math.exp(end) for end in interval],
        "bits_per_byte_difference": scored.bits_per_byte - reference.bits_per_byte,
        "bits_per_byte_difference_interval": bits_interval,
        "trained_on_the_same_text": scored.run.trained_on == reference.run.trained_on,
    }


def file_name(scored: ScoredText, selector: RunSelector, options: Options) -> str:
    """The settings, so that no answer overwrites that of other settings."""
    words = [scored.text.name, f"step{scored.run.step}", f"context{scored.context}"]
    words += [f"stride{scored.stride}"] if scored.stride != scored.context else []
    words.append(scored.run.device.dtype_name)
    words += [scored.run.pos_label] if selector.pos is not None else []
    words += [options.weights] if options.weights is not None else []
    words += ["bigram"] if options.bigram else []
    if options.reference is not None:  # runs of two sweeps may have the same name
        there = Path(options.reference).resolve()
        words.append(f"vs-{there.name}-{hashlib.sha256(str(there).encode()).hexdigest()[:6]}")
    return "_".join(words)


def to_text(answer: dict[str, Any]) -> str:
    """An answer for the terminal."""

    def with_interval(key: str, style: str) -> str:
        low, high = answer[f"{key}_interval"]
        interval = "" if low is None else f"  ({low:{style}} to {high:{style}})"
        return f"{answer[key]:{style}}{interval}"

    rows = {
        "text": f"{answer['split']}: {answer['tokens']:,} tokens, {answer['bytes']:,} bytes",
        "context": f"{answer['context']:,}, windows every {answer['stride']:,}",
        "perplexity": with_interval("perplexity", ".3f"),
        "bits per byte": with_interval("bits_per_byte", ".4f"),
    }
    if "bigram_perplexity" in answer:
        rows["bigram model"] = f"{answer['bigram_perplexity']:.3f}"
    lines = [f"  {name:<14} {value}" for name, value in rows.items()]
    lines.append(f"  95 % bootstrap intervals over {answer['resampled']}")
    if other := answer.get("reference"):
        lines += ["", f"reference {other['run']} (step {other['step']})", *comparison_lines(other)]
    return "\n".join(lines)


def comparison_lines(other: dict[str, Any]) -> list[str]:
    """Differences from a reference run, for the terminal."""
    lines = []
    if other["same_tokens"]:
        low, high = (100 * (end - 1) for end in other["perplexity_ratio_interval"])
        verdict = "" if low > 0 or high < 0 else ", not significant"
        lines.append(
            f"  perplexity     {100 * (other['perplexity_ratio'] - 1):+.2f} %  "
            f"({low:+.2f} to {high:+.2f}{verdict}), reference {other['perplexity']:.3f}"
        )
    else:
        lines.append("  perplexity     not compared: the tokenizers differ")
    interval = other["bits_per_byte_difference_interval"]
    between = "" if interval is None else "  ({:+.4f} to {:+.4f})".format(*interval)
    lines.append(
        f"  bits per byte  {other['bits_per_byte_difference']:+.4f}{between}, "
        f"reference {other['bits_per_byte']:.4f}"
    )
    if not other["trained_on_the_same_text"]:
        lines.append(
            "  The reference was trained on another text or split, and may have seen this text in training."
        )
    return lines
