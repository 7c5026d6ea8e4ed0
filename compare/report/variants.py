"""Variants: runs that differ in their seed alone, and the factors that tell them apart."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from compare.report.runs import Run
from train.config.compose import is_group
from train.config.keys import FACTORS, select
from train.config.schema import Config

#: Groups whose choices need no "key=" to be understood.
BARE = [key for key in FACTORS if is_group(key)]


@dataclass(eq=False)
class Variant:
    """Runs that differ in their seed alone."""

    factors: dict[str, Any]  # what tells it from the other variants: {"attn": "gqa", "pos": "rope"}
    runs: list[Run] = field(default_factory=list)

    @property
    def label(self) -> str:
        """'gqa rope', 'gqa n_kv_heads=1'."""
        parts = [
            str(v) if key in BARE else f"{key.partition('.')[2] or key}={plain(v)}"
            for key, v in self.factors.items()
            if v is not None
        ]
        return " ".join(parts) or "the variant"

    @property
    def seeds(self) -> dict[int, Run]:
        """Its finished runs by seed; of two with the same seed the later one."""
        return {run.seed: run for run in self.runs if run.done}

    @property
    def done(self) -> list[Run]:
        """Its finished runs, one a seed."""
        return list(self.seeds.values())

    def values(self, key: str) -> list[float]:
        """A number of the summaries of its finished runs, where they have it."""
        found = (run.get(key) for run in self.done)
        return [v for v in found if isinstance(v, int | float) and math.isfinite(v)]

    def mean(self, key: str) -> float | None:
        return statistics.fmean(self.values(key)) if self.values(key) else None

    def median(self, key: str) -> float | None:
        return statistics.median(self.values(key)) if self.values(key) else None

    def first(self, key: str) -> Any:
        """What its finished runs share: the first one's."""
        return self.done[0].get(key) if self.done else None


def plain(value: Any) -> str:
    """A config value for people: 0.003, [local,global]."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(run: Run) -> dict[str, Any]:
    """All that may tell a run's variant from another's, flat: attn, pos, attn.n_kv_heads, steps, ..."""
    config = select(run.config, FACTORS)
    choices = config.pop("choices", {})
    scalars = {key: value for key, value in config.items() if not isinstance(value, dict)}
    return {
        **{
            group: choices[group] for group in ("attn", "pos", *sorted(choices)) if group in choices
        },
        **scalars,
        **dict(flatten({key: value for key, value in config.items() if key not in scalars})),
        "stages": len(run.stages),
        "weights": "given" if run.stages[0].config.get("init_from") else "fresh",
    }


def flatten(node: Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Its values by dotted keys, without the names of classes."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        elif key != "_target_":
            yield f"{prefix}{key}", value


def variants_of(runs: Sequence[Run]) -> tuple[list[Variant], list[str]]:
    """Runs grouped by what differs between them beside the seed, in their order.

    A key that follows from those before it (the KV heads of mha and mqa) tells nothing new and is left
    out; second, the keys among these that belong to another group than they follow from.
    """
    settings = [settings_of(run) for run in runs if run.config]
    keys = list(dict.fromkeys(key for s in settings for key in s))
    factors: list[str] = []
    confounded: list[str] = []
    for key in keys:
        if len({plain(s.get(key)) for s in settings}) < 2:
            continue
        if adds(key, factors, settings):
            factors.append(key)
        elif key.partition(".")[0] not in factors and not matched_width(key, runs):
            confounded.append(key)
    grouped: dict[tuple[str, ...], Variant] = {}
    for run in runs:
        own = settings_of(run) if run.config else {"run": run.folder.name}
        mine = {key: own.get(key) for key in (factors if run.config else ["run"])}
        grouped.setdefault(tuple(map(plain, mine.values())), Variant(mine)).runs.append(run)
    found = list(grouped.values())
    if not factors and found and runs[0].config:
        own = settings_of(runs[0])
        found[0].factors = {key: own.get(key) for key in ("attn", "pos")}
    return found, confounded


def adds(key: str, factors: list[str], settings: list[dict[str, Any]]) -> bool:
    """Whether a key differs between runs that are alike in all of these factors."""
    seen: dict[tuple[str, ...], str] = {}
    for s in settings:
        cell = tuple(plain(s.get(factor)) for factor in factors)
        if seen.setdefault(cell, plain(s.get(key))) != plain(s.get(key)):
            return True
    return False


def matched_width(key: str, runs: Sequence[Run]) -> bool:
    """Whether a key is the feed-forward's width, differing because `match` made it so."""
    stages = (stage for run in runs for stage in run.stages)
    return key == "model.ff_dim" and any(stage.config.get("matched") for stage in stages)


def is_baseline(variant: Variant, wanted: dict[str, Any]) -> bool:
    """Whether a variant has all settings of a baseline, as {"attn": "mha", "attn.n_kv_heads": 2}."""
    own = settings_of(variant.runs[0])
    return all(plain(own.get(key)) == plain(value) for key, value in wanted.items())


def pairs(
    variants: Sequence[Variant], factor: str, level: str, base: str
) -> list[tuple[Variant, Variant]]:
    """Variants at a level of a factor, each with the one at `base` that differs in this alone."""
    others = [
        {k: plain(v) for k, v in variant.factors.items() if k != factor} for variant in variants
    ]
    return [
        (one, two)
        for (one, rest), (two, same) in itertools.product(
            zip(variants, others, strict=True), repeat=2
        )
        if rest == same
        and plain(one.factors.get(factor)) == level
        and plain(two.factors.get(factor)) == base
    ]
