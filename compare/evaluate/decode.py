"""Decoding speed: time to the first token, time per further token, and bytes of the KV cache.

Shapes: B texts in a batch, T tokens.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compare.evaluate.load import LoadedRun, RunSelector
from compare.evaluate.publish import publish
from compare.report.runs import read
from compare.report.variants import variants_of
from model.cache import KVCache
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
    variants, _ = variants_of([run for run in read(selector.folders) if run.done])
    if not variants:
        raise ValueError(f"run={selector.run} holds no finished run")
    runs = [selector.load(v.done[0].folder, allow_untrained=True) for v in variants]
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


@torch.no_grad()
def time_runs(
    runs: list[LoadedRun], batch_size: int, context: int, options: Options
) -> dict[Path, dict[str, Any]]:
    """Times of each run, interleaved, for B texts of T tokens. Runs share a device and a dtype.

    Raises ValueError if a cache holds other bytes than its attention layers state.
    """
    if not runs:
        return {}
    device = runs[0].device
    with device.autocast():  # around everything: weights are cast once
        texts = {run.folder: random_text(run, batch_size, context) for run in runs}
        caches = {run.folder: KVCache(run.model.shape.n_layers, context) for run in runs}
        cached = {run.folder: forward(run, texts[run.folder], cached=True) for run in runs}
        uncached = {run.folder: forward(run, texts[run.folder], cached=False) for run in runs}
        first_s = interleave(cached, device, options.repeats, warm_up=1)
        uncached_s = interleave(uncached, device, options.repeats, warm_up=1)
        prefilled = context - options.tokens
        for run in runs:
            run.model(texts[run.folder][:, :prefilled], caches[run.folder], last=True)
        steps = {
            run.folder: decoding_step(run, texts[run.folder], caches[run.folder]) for run in runs
        }
        step_s = interleave(steps, device, options.tokens - 1, warm_up=1)
    return {
        run.folder: {
            "batch_size": batch_size,
            "context": context,
            **summary(
                batch_size, context, first_s[run.folder], step_s[run.folder], uncached_s[run.folder]
            ),
            **cache_bytes(run, caches[run.folder], batch_size, context),
        }
        for run in runs
    }


def random_text(run: LoadedRun, batch_size: int, length: int) -> Tensor:
    """Random tokens (B, T): their values do not affect the times."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(run.model.shape.vocab_size, (batch_size, length), generator=generator)
    return text.to(run.device.name)


def forward(run: LoadedRun, text: Tensor, *, cached: bool) -> Callable[[], Tensor]:
    """A function that reads a whole text (B, T) and returns the greedy next tokens."""

    def read_all() -> Tensor:
        cache = KVCache(run.model.shape.n_layers, text.size(1)) if cached else None
        return run.model(text, cache, last=True).argmax(dim=-1)

    return read_all


def decoding_step(run: LoadedRun, text: Tensor, cache: KVCache) -> Callable[[], Tensor]:
    """A function that reads one more token at each call and returns the greedy next ones."""

    def step() -> Tensor:
        token = text[:, len(cache) : len(cache) + 1]
        return run.model(token, cache, last=True).argmax(dim=-1)

    return step


def summary(
    batch_size: int, context: int, first_s: list[float], step_s: list[float], full_s: list[float]
) -> dict[str, float]:
    """Medians, interquartile ranges and rates, from times in seconds."""
    first_ms, step_ms, uncached_ms = (1e3 * statistics.median(x) for x in (first_s, step_s, full_s))
    return {
        "first_token_ms": first_ms,
        "first_token_ms_iqr": iqr_ms(first_s),
        "prefill_tokens_per_second": batch_size * context / first_ms * 1e3,
        "step_ms": step_ms,
        "step_ms_iqr": iqr_ms(step_s),
        "tokens_per_second": batch_size / step_ms * 1e3,
        "uncached_step_ms": uncached_ms,
        "uncached_step_ms_iqr": iqr_ms(full_s),
        "times_as_fast_as_uncached": uncached_ms / step_ms,
    }


def iqr_ms(seconds: list[float]) -> float:
    """The interquartile range of times, in milliseconds."""
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e3 * (high - low)


def cache_bytes(run: LoadedRun, cache: KVCache, batch_size: int, context: int) -> dict[str, int]:
    """Measured bytes of a full cache. Raises ValueError unless they equal the stated ones."""
    elements = sum(mechanism.cache_elements(context) for mechanism in run.model.mechanisms)
    analytic = batch_size * elements * run.device.dtype.itemsize
    if cache.nbytes != analytic:
        raise ValueError(
            f"{run.folder}: the cache holds {cache.nbytes} bytes after {context} tokens; its "
            f"attention layers state {analytic}"
        )
    return {"cache_bytes": cache.nbytes, "cache_bytes_analytic": analytic}
