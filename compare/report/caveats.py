"""Caveats of a comparison: missing runs, unequal conditions, too few seeds, identical curves."""

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

from compare.report.runs import Run
from compare.report.variants import SIZE, Variant, adds, plain, settings_of
from compare.statistics.paired import FEW
from train.config.keys import LOSSLESS


def caveats(
    runs: Sequence[Run],
    variants: Sequence[Variant],
    confounded: Sequence[str],
    rungs: Sequence[str] = (),
) -> Iterator[str]:
    """A sentence for each reason to doubt the comparison; the `rungs` of a ladder are no reason."""
    done = [run for run in runs if run.done]
    trained = [run for run in done if run.get("steps")]
    if missing := [run for run in runs if run.over and not run.done]:
        names = ", ".join(f"{r.folder.name} ({r.reason})" for r in missing)
        yield f"{len(missing)} of {len(runs)} runs have no result: {names}."
    if to_come := sum(not run.over for run in runs):
        yield f"{to_come} of {len(runs)} runs are still to come."
    if len({run.get("data_fingerprint") for run in done}) > 1:
        yield "The runs have different corpora: neither perplexity nor bits per byte are comparable."
    elif len({run.get("tokenizer_sha256") for run in done}) > 1:
        yield "The runs have different tokenizers: they are compared in bits per byte, not perplexity."
    elif done and all(run.get("val_loss") is None and run.get("train_loss") for run in done):
        yield "No run has a validation split: compared by training loss, on the training text."
    for key in ("device", "dtype", "threads", "compiled"):
        values = sorted({plain(run.get(key)) for run in done})
        if len(values) > 1:
            yield f"{key} differs ({', '.join(values)}): times and memory are not comparable."
    for key in ("cpu", "gpu", "torch", "platform", "git_commit"):
        values = sorted({str(run.environment.get(key)) for run in done if run.environment})
        if len(values) > 1:
            yield f"The runs come from different machines or versions ({key}: {', '.join(values)})."
    kernels: dict[str, dict[str, dict[str, None]]] = {}  # by what was asked for: that is a factor
    for v in variants:
        for run in v.done if trained else ():
            same = kernels.setdefault(plain(v.factors.get("kernel")), {})
            same.setdefault(plain(run.get("kernel")), {})[v.label] = None
    for found in (found for found in kernels.values() if len(found) > 1):
        each = "; ".join(f"{kernel}: {', '.join(names)}" for kernel, names in found.items())
        yield f"Different attention kernels, so times also compare kernels ({each})."
    budgets: dict[tuple[str, ...], set[int]] = {}
    for v in variants:
        budgets.setdefault(v.only(rungs).levels, set()).update(r.tokens for r in v.runs if r.done)
    if any(len(tokens) > 1 for tokens in budgets.values()):
        yield "The runs have unequal budgets: different numbers of training tokens."
    if rungs:
        settings = [settings_of(run) for run in runs if run.config]
        confounded = [key for key in confounded if adds(key, SIZE, settings)]
    if confounded:
        yield f"{', '.join(confounded)} vary together with the variants: their effects are confounded."
    if max(at_once := runs_at_once(done), default=1) > 1:
        yield f"Up to {max(at_once)} runs shared the machine: times are not compared."
    elif 0 in at_once:
        yield "Runs were placed by an external launcher and may have shared machines: times are not compared."
    if odd := [r.folder.name for r in trained if not math.isfinite(r.get("val_loss") or 0.0)]:
        yield f"{', '.join(odd)} ended with a loss that is not finite and are excluded."
    if doubles := [v.label for v in variants if sum(run.done for run in v.runs) > len(v.seeds)]:
        yield f"{', '.join(doubles)}: more than one run with the same seed; the last one counts."
    seeds = [len(v.seeds) for v in variants if v.done]
    if trained and min(seeds) < FEW and len(variants) > 1:
        few = "one seed" if min(seeds) == 1 else f"{min(seeds)} seeds"
        yield f"Some variants have only {few}: a useful interval needs at least {FEW}."
    yield from twins(done)


def twins(done: Sequence[Run]) -> Iterator[str]:
    """A sentence for each two runs with different settings and bit-identical curves."""
    by_curve: dict[str, list[Run]] = {}
    for run in done:
        if len(run.train) > 1:
            curve = hashlib.sha256(repr(run.train).encode()).hexdigest()
            by_curve.setdefault(curve, []).append(run)
    for alike in by_curve.values():
        for one, two in itertools.pairwise(alike):
            settings, others = (settings_of(run) | dict.fromkeys(LOSSLESS) for run in (one, two))
            if settings != others or one.seed != two.seed:
                names = f"{one.folder.name} and {two.folder.name}"
                yield f"{names} have bit-identical losses: a setting had no effect, or both are the same run."


def runs_at_once(done: Sequence[Run]) -> set[int]:
    """Numbers of runs of a sweep that shared a machine; 0 where another launcher placed them."""
    return {run.environment.get("side_by_side", 1) for run in done}


def same(done: Sequence[Run], key: str) -> bool:
    """True if all runs have the same value of a key in their summaries."""
    return len({plain(run.get(key)) for run in done}) <= 1
