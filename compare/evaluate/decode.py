"""What generation costs: time to the first token, speed of each further one, bytes of the cache.

Shapes: B texts at once, T tokens.
"""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compare.evaluate.load import Opened, Opening
from compare.evaluate.publish import publish
from compare.report.runs import read
from compare.report.variants import variants_of
from model.cache import KVCache
from train.config.schema import Config, at_least
from train.measure.timer import alternate
from train.record.terminal import tracked


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval/decode.yaml. Raises ValueError for what cannot be asked."""

    batch_sizes: list[int]
    contexts: list[int]
    tokens: int
    rounds: int

    def __post_init__(self) -> None:
        at_least(2, self, "tokens", "rounds")
        if min(self.batch_sizes, default=0) < 1:
            raise ValueError(f"batch_sizes={self.batch_sizes} must be numbers of at least 1")
        if min(self.contexts, default=0) <= self.tokens:
            raise ValueError(
                f"contexts={self.contexts} must be above tokens={self.tokens}, which are decoded last"
            )


def evaluate(opening: Opening, options: Options) -> int:
    """`python eval.py run=DIR,... eval=decode`: one run of each variant, all in alternation."""
    variants, _ = variants_of([run for run in read(opening.folders) if run.done])
    if not variants:
        raise ValueError(f"run={opening.run}: no run there has finished")
    runs = [opening.open(v.done[0].folder, started=True) for v in variants]
    return publish("decode", opening, measure(runs, options))


def measure(runs: list[Opened], options: Options) -> Iterator[tuple[Path, Config]]:
    """The rows of each run, one for each batch size and context that its positions reach."""
    cells = [(rows, context) for context in options.contexts for rows in options.batch_sizes]
    found: dict[Path, list[dict[str, Any]]] = {run.folder: [] for run in runs}
    for rows, context in tracked(cells, f"decoding, {len(runs)} variants in turn"):
        reached = [run for run in runs if reaches(run, context)]
        for folder, row in timed(reached, rows, context, options).items():
            found[folder].append(row)
    for run in runs:
        yield (
            run.folder,
            {
                "step": run.step,
                "dtype": run.device.dtype_name,
                "device": run.device.name,
                "threads": torch.get_num_threads(),
                "tokens": options.tokens,
                "rows": found[run.folder],
            },
        )


def reaches(run: Opened, context: int) -> bool:
    end = run.model.position.max_len
    return end is None or context <= end


@torch.no_grad()
def timed(
    runs: list[Opened], rows: int, context: int, options: Options
) -> dict[Path, dict[str, Any]]:
    """Times of each run at B texts and T tokens, taken in turn. They must share a device and a dtype.

    Raises ValueError if a cache holds other bytes than its mechanism says.
    """
    if not runs:
        return {}
    device = runs[0].device
    with device.autocast():  # around all of it: weights are cast once
        texts = {run.folder: random_text(run, rows, context) for run in runs}
        caches = {run.folder: KVCache(run.model.shape.n_layers, context) for run in runs}
        whole = {run.folder: reader(run, texts[run.folder], cached=True) for run in runs}
        bare = {run.folder: reader(run, texts[run.folder], cached=False) for run in runs}
        first = alternate(whole, device, options.rounds, warm_up=1)
        uncached = alternate(bare, device, options.rounds, warm_up=1)
        begun = context - options.tokens
        for run in runs:
            run.model(texts[run.folder][:, :begun], caches[run.folder], last=True)
        steps = {run.folder: stepper(run, texts[run.folder], caches[run.folder]) for run in runs}
        further = alternate(steps, device, options.tokens - 1, warm_up=1)
    found = {}
    for run in runs:
        key = run.folder
        times = summary(rows, context, first[key], further[key], uncached[key])
        found[key] = {"batch_size": rows, "context": context, **times} | cache_bytes(
            run, caches[key], rows, context
        )
    return found


def random_text(run: Opened, rows: int, length: int) -> Tensor:
    """Tokens (B, T): what they say changes no time."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(run.model.shape.vocab_size, (rows, length), generator=generator)
    return text.to(run.device.name)


def reader(run: Opened, text: Tensor, *, cached: bool) -> Callable[[], Tensor]:
    """Reads a whole text (B, T) and names the likeliest next token of each."""

    def read_all() -> Tensor:
        cache = KVCache(run.model.shape.n_layers, text.size(1)) if cached else None
        return run.model(text, cache, last=True).argmax(dim=-1)

    return read_all


def stepper(run: Opened, text: Tensor, cache: KVCache) -> Callable[[], Tensor]:
    """Reads one token more at each call, and names the likeliest next one."""

    def step() -> Tensor:
        token = text[:, len(cache) : len(cache) + 1]
        return run.model(token, cache, last=True).argmax(dim=-1)

    return step


def summary(
    rows: int, context: int, first: list[float], further: list[float], uncached: list[float]
) -> dict[str, float]:
    """Medians and spreads in milliseconds, and what follows from them."""
    first_ms, step_ms, uncached_ms = (
        1e3 * statistics.median(x) for x in (first, further, uncached)
    )
    return {
        "first_token_ms": first_ms,
        "first_token_ms_iqr": iqr(first),
        "prefill_tokens_per_second": rows * context / first_ms * 1e3,
        "step_ms": step_ms,
        "step_ms_iqr": iqr(further),
        "tokens_per_second": rows / step_ms * 1e3,
        "uncached_step_ms": uncached_ms,
        "uncached_step_ms_iqr": iqr(uncached),
        "times_as_fast_as_uncached": uncached_ms / step_ms,
    }


def iqr(seconds: list[float]) -> float:
    low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return 1e3 * (high - low)


def cache_bytes(run: Opened, cache: KVCache, rows: int, context: int) -> dict[str, int]:
    """Bytes that a full cache holds, and those that its mechanisms say."""
    elements = sum(mechanism.cache_elements(context) for mechanism in run.model.mechanisms)
    analytic = rows * elements * run.device.dtype.itemsize
    if cache.nbytes != analytic:
        raise ValueError(
            f"{run.folder}: the cache holds {cache.nbytes} bytes after {context} tokens, "
            f"its mechanisms say {analytic}"
        )
    return {"cache_bytes": cache.nbytes, "cache_bytes_analytic": analytic}
