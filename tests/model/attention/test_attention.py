"""Properties of single mechanisms and of the kernels behind them."""

import math
from typing import Any

import pytest
import torch
from tiny import build, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from model.attention import attend as attend_module
from model.attention.attend import attend
from model.attention.cache import KVCache
from model.attention.grouped import GQA, MHA, MQA
from model.attention.kernel import capability, check_kernel, choose_kernel
from model.attention.mla import MLA
from model.attention.sliding_window import SlidingWindow
from model.cost import training_kernels
from model.ops.attention import attention_reference
from model.position.base import Position, Positions
from model.shape import Shape

SHAPE = Shape(dim=32, n_heads=4, n_layers=1, max_len=16, vocab_size=5)


def no_bias(q_pos: Tensor, k_pos: Tensor) -> None:
    return None


def plain(pos: Tensor) -> Positions:
    """Positions that neither rotate nor add."""
    return Position(SHAPE).at(pos)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_gqa_with_copied_kv_heads_is_mha(n_kv_heads: int) -> None:
    gqa, mha = GQA(SHAPE, 0, n_kv_heads=n_kv_heads, qk_norm=False), MHA(SHAPE, 0, qk_norm=False)
    state = gqa.state_dict()
    for name in ("k.weight", "v.weight", "k.bias", "v.bias"):
        heads = state[name].unflatten(0, (n_kv_heads, 8))
        state[name] = heads.repeat_interleave(4 // n_kv_heads, dim=0).flatten(0, 1)
    mha.load_state_dict(state)
    x, pos = random(2, 16, 32), torch.arange(16)
    expected = mha(x, plain(pos))
    torch.testing.assert_close(gqa(x, plain(pos)), expected)


def test_the_named_mechanisms_are_numbers_of_kv_heads() -> None:
    assert MHA(SHAPE, 0, qk_norm=False).n_kv_heads == 4
    mqa = MQA(SHAPE, 0, qk_norm=False)
    assert mqa.n_kv_heads == 1
    assert mqa.cache_elements(10) == 2 * 8 * 10


@pytest.mark.parametrize("n_kv_heads", [0, 3, 8])
def test_kv_heads_that_do_not_divide_the_heads_are_refused(n_kv_heads: int) -> None:
    with pytest.raises(ValueError, match=rf"n_kv_heads={n_kv_heads}.*n_heads=4.*1, 2, 4"):
        GQA(SHAPE, 0, n_kv_heads=n_kv_heads, qk_norm=False)


def test_normalised_queries_and_keys_have_no_size_of_their_own() -> None:
    attention, x, pos = (
        GQA(SHAPE, 0, n_kv_heads=2, qk_norm=True),
        random(2, 16, 32),
        torch.arange(16),
    )
    nn.init.zeros_(attention.q.bias)
    nn.init.zeros_(attention.k.bias)
    before = attention(x, plain(pos))
    with torch.no_grad():
        attention.q.weight.mul_(7)
        attention.k.weight.mul_(0.5)
    torch.testing.assert_close(attention(x, plain(pos)), before, rtol=0, atol=1e-4)
    with torch.no_grad():
        attention.q_norm.weight.mul_(7)
    after = attention(x, plain(pos))
    assert (after - before).abs().max() > 0.01


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
    expected = attention_reference(q, k, v, q_pos, k_pos, added)
    actual = attend(q, k, v, q_pos, k_pos, lambda *_: added)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kernel", ["matmul", "flash", "sdpa"])
@pytest.mark.parametrize("attn", ["mha", "gqa", "mla", "sliding"])
def test_the_kernel_that_is_asked_for_is_the_one_that_trains(attn: str, kernel: str) -> None:
    model, x = build(attn, "rope", f"kernel={kernel}"), tokens(2, 16)
    assert set(training_kernels(model, "cpu", torch.float32, 16)) == {kernel}
    with torch.profiler.profile() as recorded:
        model(x).sum().backward()
    fused = any("scaled_dot_product" in event.key for event in recorded.key_averages())
    assert fused == (kernel != "matmul")


@pytest.mark.parametrize(
    ("asked", "device", "about", "reason"),
    [
        ("flash", "cpu", {"p": 0.1}, "has no dropout on a CPU, and dropout is 0.1"),
        ("efficient", "cpu", {}, "exists on CUDA alone; matmul, flash, sdpa"),
        ("flash", "cuda 8.0", {"biased": True}, "takes no bias and no mask on CUDA"),
        ("flash", "cuda 8.0", {"dtype": torch.float32}, "needs bfloat16 or float16"),
        ("flash", "cuda 9.0", {"width": 264}, "takes heads of at most 256 channels, not 264"),
        (
            "flash",
            "cuda 7.5",
            {"dtype": torch.float16},
            "needs compute capability 8.0, and this GPU has 7.5",
        ),
        ("efficient", "cuda 7.5", {}, "has no bfloat16 at compute capability 7.5"),
        ("efficient", "cuda 8.0", {"width": 12}, "takes heads of a multiple of 8 channels, not 12"),
        (
            "cudnn",
            "cuda 9.0",
            {"width": 136},
            "takes heads of a multiple of 8 channels, at most 128, not 136",
        ),
        ("cudnn", "cuda 9.0", {"p": 0.1}, "takes dropout of a multiple of 1/16, not 0.1"),
        ("flex", "cuda 8.0", {"p": 0.1}, "has no dropout, and dropout is 0.1"),
        ("flex", "cuda 8.0", {"width": 12}, "takes heads of at least 16 channels, not 12"),
        ("flash", "mps", {"dtype": torch.float32}, "does not exist on mps"),
    ],
)
def test_a_kernel_is_refused_where_torch_would_take_another(
    asked: str, device: str, about: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, _, capability = device.partition(" ")
    there = tuple(map(int, capability.split("."))) if capability else None
    monkeypatch.setattr("model.attention.kernel.capability", lambda: there)
    about = {"width": 64, "biased": False, "p": 0.0, "dtype": torch.bfloat16} | about
    dtype = about.pop("dtype")
    assert choose_kernel(name, dtype, 16, **about, asked=asked) != asked
    with pytest.raises(ValueError, match=f"kernel={asked} {reason}.* work"):
        check_kernel(asked, name, dtype, **about)


@pytest.mark.parametrize(
    ("capability", "dtype", "about", "expected"),
    [
        ((8, 0), torch.bfloat16, {}, "flash"),
        ((9, 0), torch.bfloat16, {"p": 0.1}, "flash"),
        ((8, 0), torch.bfloat16, {"biased": True}, "efficient"),
        ((8, 0), torch.bfloat16, {"width": 12}, "flash"),
        ((8, 0), torch.bfloat16, {"width": 12, "biased": True}, "math"),
        ((8, 0), torch.bfloat16, {"width": 264}, "efficient"),
        ((8, 0), torch.float32, {}, "efficient"),
        ((7, 5), torch.float16, {}, "efficient"),
        ((7, 5), torch.bfloat16, {}, "math"),
        ((7, 5), torch.float32, {"width": 7}, "efficient"),
        ((8, 0), torch.bfloat16, {"decoding": True}, "flash"),
        ((8, 0), torch.bfloat16, {"decoding": True, "biased": True}, "matmul"),
    ],
)
def test_the_best_kernel_of_a_gpu(
    capability: tuple[int, int], dtype: torch.dtype, about: dict[str, Any], expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("model.attention.kernel.capability", lambda: capability)
    about = {"width": 64, "biased": False, "p": 0.0} | about
    assert choose_kernel("cuda", dtype, 16, **about) == expected


def online_softmax(
    blocks: list[tuple[Tensor, Tensor]],
) -> tuple[list[tuple[float, float]], Tensor]:
    """One query's attention from blocks of scores (S,) and values (S, Dv), one block at a time.

    The recurrence of flash attention (Dao et al. 2022, https://arxiv.org/abs/2205.14135): the
    largest score m, the sum l of exp(s - m) and the output o = sum of exp(s - m) v, rescaled by
    exp(m - m') whenever a block raises m to m'. Returns (m, l) after each block, and o / l.
    """
    m, l, o = -math.inf, 0.0, torch.zeros(blocks[0][1].size(-1))
    states = []
    for s, v in blocks:
        larger = max(m, s.max().item())
        e, old = (s - larger).exp(), math.exp(m - larger)
        m, l, o = larger, old * l + e.sum().item(), old * o + e @ v
        states.append((m, l))
    return states, o / l


def test_the_online_softmax_comes_out_as_by_hand() -> None:
    scores = torch.tensor([1.0, 2.0, 3.0, 0.0])
    states, y = online_softmax([*zip(scores.split(2), torch.eye(4).split(2), strict=True)])
    assert states[0] == (2, pytest.approx(1.367879, abs=1e-6))
    assert states[1] == (3, pytest.approx(1.553002, abs=1e-6))
    torch.testing.assert_close(y, scores.softmax(dim=0))  # the values are the unit vectors


@pytest.mark.parametrize("block", [1, 3, 5, 16])
def test_the_flash_kernel_computes_the_online_softmax(block: int) -> None:
    q, k, v, pos = (
        random(1, 1, 16, 8),
        random(1, 1, 16, 8, seed=1),
        random(1, 1, 16, 8, seed=2),
        torch.arange(16),
    )
    actual = attend(q, k, v, pos, pos, no_bias, kernel="flash")
    for t in range(16):
        scores = k[0, 0, : t + 1] @ q[0, 0, t] / math.sqrt(8)
        blocks = zip(scores.split(block), v[0, 0, : t + 1].split(block), strict=True)
        torch.testing.assert_close(actual[0, 0, t], online_softmax([*blocks])[1])


def test_dropout_on_attention_weights_keeps_the_mean() -> None:
    q, k, v = random(1, 2, 16, 8), random(1, 2, 16, 8, seed=1), random(1, 2, 16, 8, seed=2)
    pos = torch.arange(16)
    torch.manual_seed(0)
    drawn = torch.stack([attend(q, k, v, pos, pos, no_bias, p=0.5) for _ in range(4000)])
    expected = attend(q, k, v, pos, pos, no_bias)
    assert not torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(drawn.mean(dim=0), expected, atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("attn", "overrides", "length", "kernel"),
    [
        ("mha", "", 256, "flash"),
        ("mha", "tune=prefix", 256, "matmul"),
        ("shifted_groups", "attn.group=128", 512, "matmul"),
    ],
)
def test_the_kernel_that_is_named_is_the_one_that_computes(
    attn: str, overrides: str, length: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prefix is a mask, and groups are short."""
    long = f"model.max_len={length}"
    model = build(attn, "rope", *overrides.split(), long).train()
    assert set(training_kernels(model, "cpu", torch.float32, length)) == {kernel}
    found = set()
    real = attend_module.choose_kernel
    monkeypatch.setattr(
        attend_module, "choose_kernel", lambda *a, **k: found.add(real(*a, **k)) or real(*a, **k)
    )
    model(tokens(1, length))
    assert found == {kernel}


def test_a_sink_is_a_channel_of_the_kernel() -> None:
    assert build("sink", "rope").attention_layers[0].kernel_width == 9


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [16, 4096])
def test_the_kernel_does_not_depend_on_the_variant(
    device: str, dtype: torch.dtype, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.attention.kernel.capability", lambda: (8, 0))
    kernels = {
        training_kernels(build(attn, pos), device, dtype, length)[0]
        for attn in ("mha", "gqa", "mqa")
        for pos in ("learned", "rope", "none")
    }
    assert kernels == {choose_kernel(device, dtype, length, width=8, biased=False, p=0.0)}


@pytest.mark.parametrize("pos", ["none", "alibi", "t5"])
@pytest.mark.parametrize("queries", [600, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_the_fused_kernel_is_the_one_that_is_named(
    pos: str, queries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Biases too, one for each head, are masks that it takes."""
    q, k = random(1, 4, queries, 8).to(dtype), random(1, 4, 600, 8).to(dtype)
    k_pos, bias = torch.arange(600), build("mha", pos).position.bias
    biased = bias(k_pos, k_pos) is not None
    assert choose_kernel("cpu", dtype, 600, width=8, biased=biased, p=0.0, trained=False) == "flash"
    chosen = []

    def choose_and_attend(*inputs: Tensor, **options: Any) -> Tensor:
        chosen.append(torch._fused_sdp_choice(*inputs, **options))
        return real(*inputs, **options)

    real = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", choose_and_attend)
    attend(q, k, k, k_pos[-queries:], k_pos, bias)
    assert chosen == [SDPBackend.FLASH_ATTENTION.value]


def test_a_model_without_grouping_matches_torch() -> None:
    model, x = build("mha", "none"), tokens(1, 16)
    attention = model.attention_layers[0]
    y = model.blocks[0].attention_norm(model.embed(x))
    heads = [
        f(y).unflatten(-1, (4, 8)).transpose(1, 2) for f in (attention.q, attention.k, attention.v)
    ]
    expected = attention.out(
        F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    )
    actual = attention(y, plain(torch.arange(16)))
    torch.testing.assert_close(actual, expected)


def sliding_from(full: GQA, window: int) -> SlidingWindow:
    sliding = SlidingWindow(LONG, 0, window=window, n_kv_heads=full.n_kv_heads, qk_norm=False)
    sliding.load_state_dict(full.state_dict())
    return sliding


LONG = Shape(dim=32, n_heads=4, n_layers=1, max_len=512, vocab_size=5)


@pytest.mark.parametrize("n_kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 5, 33, 76])
@pytest.mark.parametrize("length", [5, 64, 65, 200])
def test_sliding_equals_masked_full_attention(n_kv_heads: int, window: int, length: int) -> None:
    """A token sees `window` tokens, itself included."""
    full = GQA(LONG, 0, n_kv_heads=n_kv_heads, qk_norm=False)
    x, pos = random(2, length, 32), torch.arange(length)

    class Window(Position):
        def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
            outside = q_pos[:, None] - k_pos >= window
            return torch.zeros(outside.shape).masked_fill(outside, -torch.inf).expand(4, -1, -1)

    expected = full(x, Window(LONG).at(pos))
    actual = sliding_from(full, window)(x, plain(pos))
    torch.testing.assert_close(actual, expected)


def test_a_window_of_the_whole_text_is_full_attention_and_one_less_is_not() -> None:
    full, length = GQA(LONG, 0, n_kv_heads=2, qk_norm=False), 70
    x, pos = random(2, length, 32), torch.arange(length)
    expected = full(x, plain(pos))
    whole = sliding_from(full, length)(x, plain(pos))
    assert torch.equal(whole, expected)
    less = sliding_from(full, length - 1)(x, plain(pos))
    assert torch.equal(less[:, :-1].isclose(expected[:, :-1]).all(), torch.tensor(True))
    assert not torch.allclose(less[:, -1], expected[:, -1])


@pytest.mark.parametrize("chunks", [[1] * 40, [23, *[1] * 17], [3, 20, 1, 9, 7]], ids=str)
def test_a_window_is_all_that_the_cache_keeps(chunks: list[int]) -> None:
    sliding = SlidingWindow(LONG, 0, window=7, n_kv_heads=2, qk_norm=False)
    x, pos = random(2, 40, 32), torch.arange(40)
    cache = sliding.new_cache(512)
    pieces = [
        sliding(part, plain(at), cache)
        for part, at in zip(x.split(chunks, 1), pos.split(chunks), strict=True)
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), sliding(x, plain(pos)))
    assert cache.buffers[0].shape == (2, 2, 7, 8)  # room for the window and no more
    assert KVCache([cache]).nbytes == 2 * 7 * 2 * 2 * 8 * 4
    assert sliding.cache_elements(40) == 7 * 2 * 2 * 8


@pytest.mark.parametrize("length", [256, 1024, 4096])
def test_a_window_costs_as_much_for_each_token_of_a_longer_text(length: int) -> None:
    sliding = SlidingWindow(LONG, 0, window=33, n_kv_heads=4, qk_norm=False)
    for causal in (True, False):
        once, twice = (sliding.score_flops(n, causal) for n in (length, 2 * length))
        assert once <= twice < 1.15 * once
    assert sliding.score_flops(length, True) <= sliding.score_flops(length, False)


def test_an_empty_window_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0 must be at least 1"):
        SlidingWindow(SHAPE, 0, window=0, n_kv_heads=None, qk_norm=False)


def test_a_window_is_half_the_context_by_default() -> None:
    assert SlidingWindow(SHAPE, 0, window=None, n_kv_heads=None, qk_norm=False).window == 9


@pytest.mark.parametrize("attn", ["gqa", "mqa", "sliding"])
def test_normalised_heads_are_an_option_of_every_grouped_attention(attn: str) -> None:
    """Sliding too: its scores stay the same however large the projections of queries and keys are."""
    model, x = build(attn, "rope", "attn.qk_norm=true"), tokens(2, 16)
    names = {name.rpartition(".")[0] for name, _ in build(attn, "rope").named_parameters()}
    added = {name.rpartition(".")[0] for name, _ in model.named_parameters()} - names
    assert added == {f"blocks.{i}.attention.{x}_norm" for i in range(3) for x in "qk"}
    with torch.no_grad():
        expected = model(x)
        for layer in model.attention_layers:
            layer.q.weight.mul_(7)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-3)


def test_mla_caches_a_latent_and_one_turned_key() -> None:
    mla = MLA(SHAPE, 0, latent_dim=12, rope_dim=4)
    cache = mla.new_cache(16)
    mla(random(2, 5, 32), plain(torch.arange(5)), cache)
    assert [buffer.shape for buffer in cache.buffers] == [(2, 1, 16, 12 + 4)]
    assert mla.cache_elements(5) == 5 * (12 + 4)


def test_mla_turns_its_rotary_channels_alone() -> None:
    widths = []

    class Note(Position):
        def rotate(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            widths.append((q.shape, k.shape))
            return q, k

    mla = MLA(SHAPE, 0, latent_dim=12, rope_dim=4)
    mla(random(2, 5, 32), Note(SHAPE).at(torch.arange(5)))
    assert widths == [((2, 4, 5, 4), (2, 1, 5, 4))]


def test_impossible_latents_are_refused() -> None:
    with pytest.raises(ValueError, match="latent_dim=0"):
        MLA(SHAPE, 0, latent_dim=0, rope_dim=4)
    for rope_dim in (0, 3):
        with pytest.raises(ValueError, match=f"rope_dim={rope_dim} must be even"):
            MLA(SHAPE, 0, latent_dim=8, rope_dim=rope_dim)


@pytest.mark.parametrize("kernel", ["flash", "sdpa"])
def test_fused_kernels_take_values_of_another_width(
    monkeypatch: pytest.MonkeyPatch, kernel: str
) -> None:
    q, k, v = random(2, 4, 16, 8), random(2, 2, 16, 8, seed=1), random(2, 2, 16, 5, seed=2)
    pos = torch.arange(16)
    expected = attend(q, k, v, pos, pos, no_bias)
    monkeypatch.setattr(attend_module, "choose_kernel", lambda *_, **__: kernel)
    torch.testing.assert_close(attend(q, k, v, pos, pos, no_bias), expected)


@pytest.mark.parametrize("attn", ["gqa", "sliding", "mla"])
@pytest.mark.parametrize("pos", ["rope", "alibi"])
@torch.no_grad()
def test_the_weights_for_analysis_are_those_of_the_forward_pass(attn: str, pos: str) -> None:
    model, x = build(attn, pos), random(2, 16, 32)
    layer, positions = model.attention_layers[1], model.position.at(torch.arange(16))
    weights, projected = layer.weights(x, positions), layer.project(x, positions)
    v = layer.expanded(*projected)[2] if attn == "mla" else projected[2]
    y = weights @ v.repeat_interleave(4 // v.size(1), dim=1)
    torch.testing.assert_close(layer.out(y.transpose(1, 2).flatten(2)), layer(x, positions))
    assert weights.triu(1).abs().max() == 0
    assert (weights.tril(-9).abs().max() == 0) == (attn == "sliding")  # beyond the window


def test_a_pattern_gives_each_layer_its_own_attention() -> None:
    order = ["attn.pattern=[local,global]", "attn.local.window=4", "model.n_layers=4"]
    model = build("pattern", "rope", *order, "attn@attn.global=gqa", "attn.global.n_kv_heads=1")
    assert [type(m) for m in model.attention_layers] == [SlidingWindow, GQA, SlidingWindow, GQA]
    assert [m.n_kv_heads for m in model.attention_layers] == [4, 1, 4, 1]
    assert [m.layer for m in model.attention_layers] == [0, 1, 2, 3]
    assert [m.window for m in model.attention_layers[::2]] == [4, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attn.pattern=[local,far]", "attn.pattern=far: no such choice; known: global, local"),
        ("attn.pattern=[local,local]", r"attn.pattern=\[local,local\] leaves out global"),
        ("attn.pattern=[]", "leaves out global, local"),
        ("attn.pattern=local", "attn.pattern=local is not a list"),
    ],
)
def test_patterns_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("pattern", "rope", override)


def test_the_capability_of_a_gpu_is_a_constant_to_the_compiler() -> None:
    """Marked by hand as torch's own decorator would, which loads the compiler."""

    def marked() -> int:
        return 0

    torch.compiler.assume_constant_result(marked)
    assert vars(marked)
    assert vars(marked).items() <= vars(capability).items()
