"""What every attention must hold with every position scheme, found from the config folders."""

import functools
import itertools

import pytest
import torch
from tiny import TINY, build, tokens, variants, working_pairs
from torch import nn
from torch.nn import functional as F

from compare.check.properties import (
    PROPERTIES,
    TinyVariant,
    causality,
    decoding,
    gradients,
    real_compiler,
    training,
)
from train.config.compose import choices_of, compose

BFLOAT16 = torch.autocast("cpu", torch.bfloat16)
#: Checked of every pair; the other properties follow from the hooks of a scheme, which are few.
OF_EVERY_PAIR = (causality, gradients, decoding, training)


@functools.cache
def representative() -> set[tuple[str, str]]:
    """Each attention with the first scheme for each set of hooks; each scheme with one attention."""
    hooks = {pos: build("mha", pos).position.hooks for pos in choices_of("pos")}
    firsts: dict[object, tuple[str, str]] = {}
    for attn, pos in working_pairs():
        firsts.setdefault((attn, hooks[pos]), (attn, pos))
        firsts.setdefault(pos, (attn, pos))
    return set(firsts.values())


@variants
def test_variant(attn: str, pos: str, subtests: pytest.Subtests) -> None:
    """All PROPERTIES of the representative pairs, OF_EVERY_PAIR of all; the doctor checks all of all."""
    properties = PROPERTIES if (attn, pos) in representative() else OF_EVERY_PAIR
    for holds in properties:
        with subtests.test(holds.__name__):
            holds(TinyVariant(attn, pos))


def test_every_attention_and_every_scheme_is_represented() -> None:
    assert {attn for attn, _ in representative()} == set(choices_of("attn"))
    assert {pos for _, pos in representative()} == set(choices_of("pos"))
    hooks = {pos: build("mha", pos).position.hooks for pos in choices_of("pos")}
    for attn, pos in working_pairs():
        assert any(hooks[other] == hooks[pos] for one, other in representative() if one == attn)
    assert len(representative()) < len(working_pairs())


def test_configs_of_pairs_are_what_composing_gives() -> None:
    """TinyVariant puts them together from configs of the attention and of the scheme."""
    attns, schemes = choices_of("attn"), choices_of("pos")
    for _, attn, pos in zip(range(max(len(attns), len(schemes))),
                            itertools.cycle(attns), itertools.cycle(schemes)):  # fmt: skip
        for more in ([], ["model.bias=true"]):
            whole = compose([*TINY, f"attn={attn}", f"pos={pos}", *more])
            assert TinyVariant(attn, pos).config(*more) == whole


def loss_of(model: nn.Module) -> torch.Tensor:
    logits = model(tokens(4, 16)).float()
    return F.cross_entropy(logits.flatten(0, 1), tokens(4, 16, seed=1).flatten())


@variants
def test_bfloat16_stays_near_float32_and_trains(attn: str, pos: str) -> None:
    model = build(attn, pos).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    exact, losses = loss_of(model), []
    for _ in range(3):
        with BFLOAT16:
            losses.append(loss_of(model))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(losses[0], exact, rtol=2e-3, atol=0)
    assert losses[0] > losses[1] > losses[2]


def test_the_real_compiler_agrees() -> None:
    real_compiler(TinyVariant("gqa", "rope"))
