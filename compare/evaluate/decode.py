"""Decoding speed: time to the first token, time per further token, and bytes of the KV cache.

Shapes: B texts in a batch, T tokens.
"""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from compare.evaluate.load import LoadedRun, RunSelector
from compare.evaluate.publish import publish
from compare.report.runs import read
from compare.report.variants import variants_of
from model.attention.cache import KVCache
from train.config.schema import Config, at_least
from train.measure.timer import interleave
from train.record.terminal import tracked


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/decode.yaml. Raises ValueError for invalid values."""

    batch_sizes: list[int]
    contexts: list[int]
    tokens: int
    repeats: int

    def __post_init__(self) -> None:
        at_least(2, self, "tokens", "repeats")
        if min(self.batch_sizes, default=0) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes} must be at least 1")
        if min(self.contexts, default=0) <= self.tokens:
            raise ValueError(
                f"contexts={self.contexts} must be above tokens={self.tokens}, the tokens decoded last"
            )


def evaluate(selector: RunSelector, options: Options) -> int:
    """`python eval.py run=DIR,... eval=decode`: one run of each variant, interleaved."""
    selector.refuse_data("decode")
    variants, _ = variants_of([run for run in read(selector.folders) if run.done])
    if not variants:
        raise ValueError(f"run={selector.run} holds no finished run")
    runs = [selector.load(v.done[0].folder, allow_untrained=True) for v in variants]
    if len(dtypes := {run.device.dtype_name for run in runs}) > 1:
        raise ValueError(
            f"run={selector.run} has runs in {', '.join(sorted(dtypes))}, whose times do not compare: "
            f"give dtype={min(dtypes)}"
        )
    return publish("decode", selector, measure(runs, options))


def measure(runs: list[LoadedRun], options: Options) -> Iterator[tuple[Path, Config]]:
    """An answer for each run: a row for each batch size and each context that its positions reach."""
    cells = [(batch, context) for context in options.contexts for batch in options.batch_sizes]
    rows: dict[Path, list[dict[str, Any]]] = {run.folder: [] for run in runs}
    for batch_size, context in tracked(cells, f"decoding, {len(runs)} variants interleaved"):
        reaching = [run for run in runs if run.reaches(context)]
        for folder, row in time_runs(reaching, batch_size, context, options).items():
            rows[folder].append(row)
    for run in runs:
        yield (
            run.folder,
            {
                "step": run.step,
                "dtype": run.device.dtype_name,
                "device": run.device.name,
                "threads": torch.get_num_threads(),
                "tokens": options.tokens,
                "rows": rows[run.folder],
            },
        )


class Decoder:
    """A run that reads random tokens (B, T), whose values do not affect the times, greedily."""

    def __init__(self, run: LoadedRun, batch_size: int, context: int) -> None:
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(run.model.shape.vocab_size, (batch_size, context), generator=generator)
        self.run, self.text = run, text.to(run.device.name)
        self.cache = self.new_cache()
        self.launch_s: list[float] = []  # seconds of each step until it was given to the device

    def new_cache(self) -> KVCache:
        """An empty cache for the whole text."""
        return self.run.model.new_cache(self.text.size(1))

    def read(self, tokens: Tensor, cache: KVCache | None) -> Tensor:
        """The most likely next tokens (B, 1)."""
        model = self.run.model
        return model.head(model.hidden(tokens, cache)[:, -1:]).argmax(dim=-1)

    def first_token(self) -> Tensor:
        """Read the whole text into a new cache."""
        return self.read(self.text, self.new_cache())

    def uncached_step(self) -> Tensor:
        """Read the whole text without a cache."""
        return self.read(self.text, None)

    def step(self, tokens: int = 1) -> Tensor:
        """Read the next tokens of the text into the cache."""
        start, seen = perf_counter(), len(self.cache)
        read = self.read(self.text[:, seen : seen + tokens], self.cache)
        self.launch_s.append(perf_counter() - start)
        return read


@torch.no_grad()
def time_runs(
    runs: list[LoadedRun], batch_size: int, context: int, options: Options
) -> dict[Path, dict[str, Any]]:
    """A row for each run, timed in turn with the others. Runs share a device and a dtype."""
    if not runs:
        return {}
    device = runs[0].device
    with device.autocast():  # around everything: weights are cast once
        decoders = {run.folder: Decoder(run, batch_size, context) for run in runs}
        first = {folder: decoder.first_token for folder, decoder in decoders.items()}
        uncached = {folder: decoder.uncached_step for folder, decoder in decoders.items()}
        first_s = interleave(first, device, options.repeats, warm_up=1)
        uncached_s = interleave(uncached, device, options.repeats, warm_up=1)
        for decoder in decoders.values():
            decoder.step(context - options.tokens)
        steps = {folder: decoder.step for folder, decoder in decoders.items()}
        step_s = interleave(steps, device, options.tokens - 1, warm_up=1)
    return {
        folder: row_of(decoder, first_s[folder], step_s[folder], uncached_s[folder])
        for folder, decoder in decoders.items()
    }


def row_of(
    decoder: Decoder, first_s: list[float], step_s: list[float], uncached_s: list[float]
) -> dict[str, float | None]:
    """Medians, interquartile ranges and rates, from times in seconds, and the bytes of the cache."""
    batch_size, context = decoder.text.shape
    first_ms, first_iqr = median_and_iqr_ms(first_s)
    step_ms, step_iqr = median_and_iqr_ms(step_s)
    uncached_ms, uncached_iqr = median_and_iqr_ms(uncached_s)
    launched = 1e3 * statistics.median(decoder.launch_s[-len(step_s) :]) / step_ms
    return {
        "batch_size": batch_size,
        "context": context,
        "first_token_ms": first_ms,
        "first_token_ms_iqr": first_iqr,
        "prefill_tokens_per_second": batch_size * context / first_ms * 1e3,
        "step_ms": step_ms,
        "step_ms_iqr": step_iqr,
        "tokens_per_second": batch_size / step_ms * 1e3,
        "uncached_step_ms": uncached_ms,
        "uncached_step_ms_iqr": uncached_iqr,
        "times_as_fast_as_uncached": uncached_ms / step_ms,
        # Of a step's time; near 1 the device waits for Python, and its times tell little of the cache.
        "launch_share": None if decoder.run.device.name == "cpu" else launched,
        **cache_bytes(decoder),
    }


def median_and_iqr_ms(seconds: list[float]) -> tuple[float, float]:
    """The median and the interquartile range of times, in milliseconds."""
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e3 * middle, 1e3 * (high - low)


def cache_bytes(decoder: Decoder) -> dict[str, int]:
    """Measured bytes of a full cache. Raises ValueError unless they equal the stated ones."""
    (batch_size, context), run = decoder.text.shape, decoder.run
    layers = run.model.attention_layers
    held = context + run.model.prompt_tokens
    analytic = batch_size * sum(m.cache_bytes(held, run.device.dtype) for m in layers)
    if decoder.cache.nbytes != analytic:
        raise ValueError(
            f"{run.folder}: the cache holds {decoder.cache.nbytes} bytes after {context} tokens; "
            f"its attention layers state {analytic}"
        )
    return {"cache_bytes": analytic, "cache_bytes_analytic": analytic}
