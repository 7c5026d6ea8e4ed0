"""Fast paths of the model, each held to its plain form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.ops.attention import (
    attention_reference,
    causal_mask,
    fused_attention,
    matmul_attention,
)
from model.ops.cross_entropy import chunked_cross_entropy, cross_entropy_reference
from model.ops.dropout import apply_mask_reference, dropout, random_mask
from model.ops.nf4 import BITS_PER_WEIGHT, codes, nf4
from model.ops.rms_norm import rms_norm, rms_norm_reference
from model.ops.rotary import apply_rotary, rotary_reference


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
@pytest.mark.parametrize(
    "special", [(), (-0.0, torch.inf, -torch.inf, torch.nan)], ids=["", "special"]
)
def test_dropout_is_its_reference(dtype: torch.dtype, special: tuple[float, ...]) -> None:
    """Bit for bit, with the same mask; no infinity comes through where an element is dropped."""
    x = random(dtype, 64, 65)
    x.flatten()[: 8 * len(special)] = torch.tensor(special).repeat(8)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(5)
    fast = dropout(inputs[0], 0.2, training=True)
    torch.manual_seed(5)
    plain = apply_mask_reference(inputs[1], random_mask(x.shape, 51)) * (256 / 205)
    for y in (fast, plain):
        y.backward(random(dtype, 64, 65, seed=1))
    for one, two in ((fast, plain), (inputs[0].grad, inputs[1].grad)):
        assert torch.equal(bits(one), bits(two))


def bits(x: Tensor) -> Tensor:
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def assert_same(
    fast: Callable[..., Tensor], reference: Callable[..., Tensor], *inputs: Tensor
) -> None:
    """A fast form has the values and gradients of its reference, computed in float64."""
    exact = [x.double().requires_grad_() for x in inputs]
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[inputs[0].dtype]
    expected, actual = reference(*exact), fast(*inputs)
    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    expected.backward(grad.double())
    actual.backward(grad.to(actual.dtype))
    for ours, theirs in [
        (actual, expected),
        *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True)),
    ]:
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * scale)


def random(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@precisions
def test_rms_norm_is_its_reference(dtype: torch.dtype) -> None:
    x, weight = random(dtype, 3, 5, 16), random(dtype, 16, seed=1)
    assert_same(
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
        x,
        weight,
    )
    weight = weight.float()
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5), rtol=1.6e-2, atol=1e-5
    )


@precisions
@pytest.mark.parametrize("width", [8, 4])
def test_rotation_is_its_reference(dtype: torch.dtype, width: int) -> None:
    angles = torch.arange(6)[:, None] * torch.ones(width // 2)
    cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(dtype)
    sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(dtype)
    assert_same(
        lambda x: apply_rotary(x, cos, sin),
        lambda x: rotary_reference(x, cos.double(), sin.double()),
        random(dtype, 2, 3, 6, 8),
    )


@precisions
def test_cross_entropy_by_chunks_is_its_reference(dtype: torch.dtype) -> None:
    targets = torch.arange(10) % 7
    assert_same(
        lambda x, w: chunked_cross_entropy(x, w, targets, 3),
        lambda x, w: F.cross_entropy(x @ w.T, targets),
        random(dtype, 10, 4),
        random(dtype, 7, 4, seed=1),
    )
    x, weight = random(dtype, 10, 4), random(dtype, 7, 4, seed=1)
    whole = cross_entropy_reference(x, weight, targets)
    torch.testing.assert_close(chunked_cross_entropy(x, weight, targets, 3), whole)


@precisions
@pytest.mark.parametrize(("queries", "biased"), [(6, False), (6, True), (2, True), (1, False)])
def test_attention_is_its_reference(dtype: torch.dtype, queries: int, biased: bool) -> None:
    q, k, v = random(dtype, 2, 4, queries, 8), random(dtype, 2, 2, 6, 8), random(dtype, 2, 2, 6, 8)
    q_pos, k_pos = torch.arange(6 - queries, 6), torch.arange(6)
    bias = random(torch.float32, 4, queries, 6, seed=3) if biased else None
    mask = causal_mask(q_pos, k_pos, dtype) + (0 if bias is None else bias.to(dtype))

    def reference(*qkv: Tensor) -> Tensor:
        return attention_reference(*qkv, q_pos, k_pos, bias)

    assert_same(lambda *x: matmul_attention(*x, q_pos, k_pos, bias, 0.0), reference, q, k, v)
    for kernel in ("flash", "sdpa"):  # the latter copies KV heads

        def fused(*qkv: Tensor, kernel: str = kernel) -> Tensor:
            return fused_attention(*qkv, mask, 0.0, is_causal=False, kernel=kernel)

        assert_same(fused, reference, q, k, v)


def test_four_bits_keep_the_quantiles_of_a_normal() -> None:
    """The authors' 16 values; weights that are such values come back exactly."""
    values = codes()
    published = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
                 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    torch.testing.assert_close(values, torch.tensor(published), rtol=0, atol=2e-6)
    exact = values.repeat(4 * 5).view(5, 64) * 0.5
    torch.testing.assert_close(nf4(exact), exact)
    assert pytest.approx(4.127, abs=5e-4) == BITS_PER_WEIGHT


@pytest.mark.parametrize("shape", [(64,), (7, 9), (3, 100), (512, 192)])
def test_four_bits_give_a_weight_back_with_a_small_error(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    back = nf4(weight)
    assert back.shape == weight.shape
    assert len(back.flatten()[:64].unique()) <= 16  # one block
    error = (back - weight).pow(2).mean().sqrt() / weight.std()
    assert 0 < error < 0.12
    assert torch.equal(nf4(torch.zeros(shape)), torch.zeros(shape))
