"""Variants, groups of runs that differ only in their seed, and the factors between them."""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from compare.report.runs import Run
from compare.statistics.ladder import RUNGS
from train.config.compose import is_group
from train.config.keys import FACTORS, KEYS, select
from train.config.schema import Config

#: Groups whose choices need no "key=" to be understood.
BARE = [key for key in FACTORS if is_group(key)]
SIZE = ["model.dim", "model.n_layers"]


@dataclass(eq=False)
class Variant:
    """Runs that differ only in their seed."""

    factors: dict[str, Any]  # settings that differ from other variants': {"attn": "gqa", ...}
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

    def answers(self, kind: str) -> list[Config]:
        """The answers to an evaluation of its finished runs, one a seed."""
        return [answer for run in self.done if (answer := run.answer(kind))]

    def values(self, key: str) -> list[float]:
        """The finite values of a key in the summaries of its finished runs."""
        numbers = (run.get(key) for run in self.done)
        return [x for x in numbers if isinstance(x, int | float) and math.isfinite(x)]

    def mean(self, key: str) -> float | None:
        return statistics.fmean(self.values(key)) if self.values(key) else None

    def median(self, key: str) -> float | None:
        return statistics.median(self.values(key)) if self.values(key) else None

    def first(self, key: str) -> Any:
        """The value of a key in the summary of its first finished run."""
        return self.done[0].get(key) if self.done else None

    def without(self, *factors: str) -> "Variant":
        """The same without some factors, and without runs: for its label and its other levels."""
        return Variant({key: level for key, level in self.factors.items() if key not in factors})

    def only(self, factors: Sequence[str]) -> "Variant":
        """The same with these factors alone, and without runs."""
        return self.without(*(key for key in self.factors if key not in factors))

    def level(self, factor: str) -> str:
        """The level of a factor, as text."""
        return plain(self.factors.get(factor))

    @property
    def levels(self) -> tuple[str, ...]:
        """The levels of all factors, as text."""
        return tuple(map(plain, self.factors.values()))


def plain(value: Any) -> str:
    """A config value as text: 0.003, [local,global]."""
    if isinstance(value, list):
        return f"[{','.join(map(plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_of(run: Run) -> dict[str, Any]:
    """The settings that can be factors, flat: attn, pos, attn.n_kv_heads, steps, ..."""
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
    """Runs grouped by all settings that differ between them, except the seed; and confounded keys.

    A key that is determined by the factors before it (the KV heads of mha and mqa) is no factor. It
    is confounded if it does not belong to the group of such a factor.
    """
    settings = [settings_of(run) for run in runs if run.config]
    keys = list(dict.fromkeys(key for s in settings for key in s))
    factors: list[str] = []
    confounded: list[str] = []
    for key in keys:
        dependent = key in KEYS and KEYS[key].only_with  # without effect where it is left out
        if len({plain(s.get(key)) for s in settings if key in s or not dependent}) < 2:
            continue
        if adds(key, factors, settings):
            factors.append(key)
        elif key.partition(".")[0] not in factors and not matched_width(key, runs):
            confounded.append(key)
    grouped: dict[tuple[str, ...], Variant] = {}
    for run in runs:
        found = settings_of(run) if run.config else {"run": run.folder.name}
        variant = Variant({key: found.get(key) for key in (factors if run.config else ["run"])})
        grouped.setdefault(variant.levels, variant).runs.append(run)
    variants = list(grouped.values())
    if not factors and variants and runs[0].config:
        found = settings_of(runs[0])
        variants[0].factors = {key: found.get(key) for key in ("attn", "pos")}
    return variants, confounded


def adds(key: str, factors: list[str], settings: list[dict[str, Any]]) -> bool:
    """True if a key differs between runs that have the same levels of these factors."""
    seen: dict[tuple[str, ...], str] = {}
    for s in settings:
        cell = tuple(plain(s.get(factor)) for factor in factors)
        if seen.setdefault(cell, plain(s.get(key))) != plain(s.get(key)):
            return True
    return False


def rungs_of(variants: Sequence[Variant], base: Variant) -> list[str]:
    """The factors that follow from a model's size, as its name and steps, in a ladder; else none.

    A ladder has the baseline and another variant at three sizes that they share, finished or not, and
    variants that differ in one factor at each size: a grid of several is compared factor by factor.
    """
    known = [v for v in variants if v.runs[0].config]
    settings = [settings_of(v.runs[0]) for v in known]
    rungs = [key for key in base.factors if not adds(key, SIZE, settings)]
    if len(base.factors) - len(rungs) != 1:
        return []
    sizes: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for v, s in zip(known, settings, strict=True):
        sizes.setdefault(v.without(*rungs).levels, set()).add(
            tuple(plain(s.get(key)) for key in SIZE)
        )
    own = sizes.pop(base.without(*rungs).levels, set())
    return rungs if any(len(own & other) >= RUNGS for other in sizes.values()) else []


def baselines_of(
    variants: Sequence[Variant], base: Variant, rungs: Sequence[str]
) -> dict[Variant, Variant]:
    """The variant that each is compared with: the baseline, on a ladder the one of the same size."""
    others = base.without(*rungs).levels
    by_rung = {v.only(rungs).levels: v for v in variants if v.without(*rungs).levels == others}
    by_rung[base.only(rungs).levels] = base
    found = {v: by_rung.get(v.only(rungs).levels) for v in variants}
    return {v: own for v, own in found.items() if own is not None}


def matched_width(key: str, runs: Sequence[Run]) -> bool:
    """True for the feed-forward's width where `match` has set it."""
    stages = (stage for run in runs for stage in run.stages)
    return key == "model.ff_dim" and any(stage.config.get("matched") for stage in stages)


def is_baseline(variant: Variant, wanted: dict[str, Any]) -> bool:
    """True if a variant has all these settings: {"attn": "mha", "attn.n_kv_heads": 2}."""
    settings = settings_of(variant.runs[0])
    return all(plain(settings.get(key)) == plain(value) for key, value in wanted.items())


def pairs(
    variants: Sequence[Variant], factor: str, level: str, base: str
) -> list[tuple[Variant, Variant]]:
    """Variants at a level of a factor, each with the one at `base` that differs in nothing else."""
    return [
        (one, two)
        for one, two in itertools.product(variants, repeat=2)
        if one.level(factor) == level
        and two.level(factor) == base
        and one.without(factor).levels == two.without(factor).levels
    ]
