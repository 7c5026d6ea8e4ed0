"""Dropout by random bytes."""

import pytest
import torch

from model.ops.dropout import dropout


@pytest.mark.parametrize(("p", "rounded"), [(0.1, 26 / 256), (0.2, 51 / 256), (0.5, 0.5)])
def test_it_drops_the_rounded_share_and_keeps_the_mean(p: float, rounded: float) -> None:
    torch.manual_seed(0)
    y = dropout(torch.ones(1000, 1001), p, training=True)
    for part in (y, y[:, 0::4], y[:, 3::4]):  # no byte of a word is special
        assert (part == 0).float().mean() == pytest.approx(rounded, abs=3e-3)
    assert y.mean() == pytest.approx(1.0, abs=4e-3)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / (1 - rounded)])


def test_a_tiny_share_is_not_rounded_to_nothing() -> None:
    assert (dropout(torch.ones(100_000), 1e-4, training=True) == 0).any()


def test_it_follows_the_global_seed_and_rests_outside_training() -> None:
    x = torch.ones(64, 64)
    torch.manual_seed(3)
    first = dropout(x, 0.5, training=True)
    assert not torch.equal(dropout(x, 0.5, training=True), first)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5, training=True), first)
    assert dropout(x, 0.5, training=False) is x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gradients_flow_where_values_do(dtype: torch.dtype) -> None:
    x = torch.ones(64, 64, dtype=dtype, requires_grad=True)
    y = dropout(x, 0.5, training=True)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
