"""Properties of single mechanisms and of the kernels behind them."""

import pytest
import torch
from tiny import build, tokens
from torch import Tensor
from torch.nn import functional as F

from model.attention import attend as attend_module
from model.attention.attend import attend, causal_mask, choose_kernel
from model.attention.grouped import GQA, MHA, MQA
from model.shape import Shape

SHAPE = Shape(dim=32, n_heads=4, n_layers=1, max_len=16, vocab_size=5)


def no_bias(q_pos: Tensor, k_pos: Tensor) -> None:
    return None


def no_rotation(q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
    return q, k


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_gqa_with_copied_kv_heads_is_mha(n_kv_heads: int) -> None:
    gqa, mha = GQA(SHAPE, 0, n_kv_heads=n_kv_heads), MHA(SHAPE, 0)
    state = gqa.state_dict()
    for name in ("k.weight", "v.weight", "k.bias", "v.bias"):
        heads = state[name].unflatten(0, (n_kv_heads, 8))
        state[name] = heads.repeat_interleave(4 // n_kv_heads, dim=0).flatten(0, 1)
    mha.load_state_dict(state)
    x, pos = random(2, 16, 32), torch.arange(16)
    expected = mha(x, pos, no_rotation, no_bias)
    torch.testing.assert_close(gqa(x, pos, no_rotation, no_bias), expected)


def test_the_named_mechanisms_are_numbers_of_kv_heads() -> None:
    assert MHA(SHAPE, 0).n_kv_heads == 4
    assert MQA(SHAPE, 0).n_kv_heads == 1
    assert MQA(SHAPE, 0).cache_elements == 2 * 8


@pytest.mark.parametrize("n_kv_heads", [0, 3, 8])
def test_kv_heads_that_do_not_divide_the_heads_are_refused(n_kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"n_kv_heads={n_kv_heads}.*n_heads=4.*1, 2, 4"):
        GQA(SHAPE, 0, n_kv_heads=n_kv_heads)


@pytest.mark.parametrize("kernel", ["matmul", "flash", "sdpa"])
@pytest.mark.parametrize(("queries", "keys"), [(16, 16), (5, 16), (1, 16)])
@pytest.mark.parametrize("biased", [False, True])
def test_every_kernel_gives_the_textbook_result(
    monkeypatch: pytest.MonkeyPatch, kernel: str, queries: int, keys: int, biased: bool
) -> None:
    monkeypatch.setattr(attend_module, "choose_kernel", lambda *_, **__: kernel)
    q, k, v = random(2, 4, queries, 8), random(2, 2, keys, 8, seed=1), random(2, 2, keys, 8, seed=2)
    added = random(4, queries, keys, seed=3) if biased else None
    q_pos, k_pos = torch.arange(keys - queries, keys), torch.arange(keys)
    scores = q @ k.repeat_interleave(2, dim=1).mT / 8**0.5
    scores = scores + (0 if added is None else added) + causal_mask(q_pos, k_pos, q.dtype)
    expected = scores.softmax(dim=-1) @ v.repeat_interleave(2, dim=1)
    actual = attend(q, k, v, q_pos, k_pos, lambda *_: added)
    torch.testing.assert_close(actual, expected)


def test_dropout_on_attention_weights_keeps_the_mean() -> None:
    q, k, v = random(1, 2, 16, 8), random(1, 2, 16, 8, seed=1), random(1, 2, 16, 8, seed=2)
    pos = torch.arange(16)
    torch.manual_seed(0)
    drawn = torch.stack([attend(q, k, v, pos, pos, no_bias, p=0.5) for _ in range(4000)])
    expected = attend(q, k, v, pos, pos, no_bias)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(dim=0), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [16, 4096])
def test_the_kernel_does_not_depend_on_the_variant(
    device: str, dtype: torch.dtype, length: int
) -> None:
    kernels = {
        build(attn, pos).kernels(device, dtype, length)[0]
        for attn in ("mha", "gqa", "mqa")
        for pos in ("learned", "rope", "none")
    }
    assert kernels == {choose_kernel(device, dtype, length, biased=False, p=0.0)}


def test_the_fused_kernel_is_the_one_that_is_named() -> None:
    long = random(1, 2, 600, 8)
    pos = torch.arange(600)
    assert choose_kernel("cpu", torch.float32, 600, biased=False, p=0.0) == "flash"
    with torch.profiler.profile() as recorded:
        attend(long, long, long, pos, pos, no_bias)
    names = {event.key for event in recorded.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names


def test_a_model_without_grouping_matches_torch() -> None:
    model, x = build("mha", "none"), tokens(1, 16)
    mechanism = model.mechanisms[0]
    y = model.blocks[0].attention_norm(model.embed(x))
    heads = [
        f(y).unflatten(-1, (4, 8)).transpose(1, 2) for f in (mechanism.q, mechanism.k, mechanism.v)
    ]
    expected = mechanism.out(
        F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    )
    actual = mechanism(y, torch.arange(16), no_rotation, no_bias)
    torch.testing.assert_close(actual, expected)
