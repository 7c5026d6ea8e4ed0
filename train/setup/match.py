"""Matched budgets: the feed-forward of a variant resized to the cost of a baseline."""

import shlex

from train.config.compose import compose, group_of, parse, quoted
from train.config.old_spellings import current_overrides
from train.config.schema import Config, choose

BUDGETS = ("params", "flops")
STEP = 8  # widths are multiples of it: odd ones are slow on every device


def compose_matched(overrides: list[str]) -> Config:
    """The config of a run, its `model.ff_dim` resized if `match` asks for it.

    The leftover is kept under `matched`. Raises ValueError if there is no baseline to match, or no
    width that comes near it.
    """
    config = compose(overrides)
    match, baseline = config["match"], config["baseline"]
    asked = None if baseline is None else baseline_overrides(baseline)
    if match is None:
        return config
    choose("match", match, dict.fromkeys(BUDGETS))
    if asked is None:
        raise ValueError(f'match={match} needs a baseline: baseline="attn=mha pos=rope"')
    named = {o.key_or_group for o in parse(asked)}
    kept = [o for o in overrides if not replaced(o.partition("=")[0], named)]
    return resized(config, match, budget(compose([*kept, *asked]), match))


def replaced(key: str, named: set[str]) -> bool:
    """True if a baseline that sets the keys `named` replaces an override: attn=gqa replaces attn.*"""
    return key in named or group_of(key) in named


def baseline_overrides(text: str) -> list[str]:
    """A baseline's overrides. Raises ValueError if they name more than an attention and positions."""
    if not isinstance(text, str) or not text:
        raise ValueError(f'baseline={text} is not a text such as "attn=mha pos=rope"')
    overrides = current_overrides("train", shlex.split(text))
    for override in parse(overrides):
        if group_of(override.key_or_group) not in ("attn", "pos"):
            raise ValueError(
                f"baseline={text}: {override.input_line} is neither attn, pos nor a key of theirs"
            )
    return overrides


def baseline_of(overrides: list[str]) -> str:
    """The attention and positions of a run, as a baseline for others."""
    choices = compose(overrides)["choices"]
    own = [o for o in overrides if group_of(o.partition("=")[0]) in ("attn", "pos")]
    named = [
        f"{g}={choices[g]}" for g in ("attn", "pos") if not any(o.startswith(f"{g}=") for o in own)
    ]
    return shlex.join([*named, *own])


def with_baseline(cells: list[list[str]]) -> list[list[str]]:
    """The cells of a sweep, with the first as the baseline to match where none is named."""
    first = compose(cells[0])
    if first["match"] is None or first["baseline"] is not None:
        return cells
    baseline = f"baseline={quoted(baseline_of(cells[0]))}"
    return [[*cell, baseline] for cell in cells]


def budget(config: Config, match: str, ff_dim: int | None = None) -> float:
    """Parameters, or training FLOPs a token, of a config's model with a feed-forward of this width."""
    import torch

    from model.cost import count_parameters, flops_per_token
    from train.setup.build import build_model

    node = config["model"] if ff_dim is None else config["model"] | {"ff_dim": ff_dim}
    with torch.device("meta"):
        model = build_model(config | {"model": node}, vocab_size=1)
    if match == "params":
        return count_parameters(model)[0]
    return flops_per_token(model, model.shape.max_len)


def resized(config: Config, match: str, target: float) -> Config:
    """The config with the width whose budget comes nearest to the target.

    Parameters and FLOPs are both a + b * ff_dim, so two widths tell all. The vocabulary costs every
    variant the same and is left out of both.
    """
    if budget(config, match) == target:  # the baseline itself, whatever its width
        return config
    one, two = budget(config, match, STEP), budget(config, match, 2 * STEP)
    width = STEP * round((target - (one - (two - one))) / (two - one))
    if width < STEP:
        raise ValueError(
            f"match={match}: the baseline's budget of {target:,.0f} leaves no room for a feed-forward; "
            f"without one this variant costs {2 * one - two:,.0f}"
        )
    got = budget(config, match, width)
    matched = {"budget": match, "target": target, "reached": got, "leftover": got / target - 1}
    return config | {"model": config["model"] | {"ff_dim": width}, "matched": matched}
