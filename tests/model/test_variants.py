"""What every attention must hold with every position scheme, found from the config folders."""

from collections.abc import Callable

import pytest
import torch
from tiny import build, tokens, variants
from torch import nn
from torch.nn import functional as F

from compare.check.properties import PROPERTIES, TinyVariant, real_compiler

BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
@variants
def test_variant(attn: str, pos: str, holds: Callable[[TinyVariant], None]) -> None:
    holds(TinyVariant(attn, pos))


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
