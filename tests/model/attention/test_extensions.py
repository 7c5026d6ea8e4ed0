"""The extensions of grouped-query attention: each equals it at a stated value, and its own formula
elsewhere."""

import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from tiny import build, tokens
from torch import Tensor
from torch.nn import functional as F

from compare.check.properties import (
    TinyVariant,
    cache_bytes,
    causality,
    composed,
    decoding,
    flops,
    gradients,
    one_graph,
)
from model.attention.extensions.differential import DifferentialAttention
from model.attention.extensions.exclusive import ExclusiveAttention
from model.attention.extensions.forgetting import ForgettingAttention
from model.attention.extensions.gated import GatedAttention
from model.attention.extensions.key_shift import KeyShiftAttention
from model.attention.extensions.short_conv import ShortConv, ShortConvAttention
from model.attention.extensions.sink import SinkAttention
from model.attention.extensions.value_residual import ValueResidualAttention
from model.attention.grouped import GQA
from model.attention.kernel import choose_kernel
from model.cost import training_kernels
from model.ops.attention import attention_reference
from model.position.base import Position, Positions
from model.position.rope import RoPE
from model.shape import Shape
from model.transformer import Transformer
from train.setup.huggingface import home_of

SHAPE = Shape(dim=32, n_heads=4, n_layers=2, max_len=16, vocab_size=5)
POS = torch.arange(16)
NAMES = ("gated sink differential forgetting exclusive key_shift short_conv value_residual").split()
every_extension = pytest.mark.parametrize("attn", NAMES)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = random(2, 16, 32)


class Slope(Position):
    """A bias of each head's own."""

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        return -(q_pos[:, None] - k_pos).abs() * random(4, seed=3).abs()[:, None, None]


def plain() -> Positions:
    return Position(SHAPE).at(POS)


def made(kind: type[GQA], n_kv_heads: int = 4, seed: int = 0, **options: object) -> GQA:
    """A mechanism with drawn parameters."""
    attention = kind(SHAPE, 0, n_kv_heads=n_kv_heads, qk_norm=False, **options)
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_(0, 0.3, generator=drawn)
    return attention


def projected(attention: GQA, x: Tensor = X) -> tuple[Tensor, Tensor, Tensor]:
    """Plain queries, keys and values (B, heads, T, Dh) of a mechanism's weights."""
    return (
        attention.heads(attention.q(x), 4),
        attention.heads(attention.k(x), attention.n_kv_heads),
        attention.heads(attention.v(x), attention.n_kv_heads),
    )


def output(attention: GQA, y: Tensor) -> Tensor:
    return attention.out(y.transpose(1, 2).flatten(2))


def at_gate_one(attention: GatedAttention) -> None:
    attention.gate.weight.zero_()
    attention.gate.bias.fill_(40.0)  # sigmoid is 1 in float32


def at_minus_infinity(attention: SinkAttention) -> None:
    attention.sink_bias.fill_(-1e4)


def at_lambda_zero(attention: DifferentialAttention) -> None:
    attention.subtracted.weight.zero_()
    attention.subtracted.bias.fill_(-40.0)


def at_gates_of_one(attention: ForgettingAttention) -> None:
    attention.forget.weight.zero_()
    attention.forget.bias.fill_(40.0)


def at_taps_zero(attention: ShortConvAttention) -> None:
    attention.k_conv.taps.zero_()
    attention.v_conv.taps.zero_()


def at_own_values(attention: ValueResidualAttention) -> None:
    attention.mix_bias.copy_(torch.tensor([0.5, -0.5]))


def at_its_option(attention: GQA) -> None:
    """Nothing: the option itself is the value."""


@dataclass(frozen=True)
class Parent:
    """Where a mechanism is its parent: an option, or values of its parameters."""

    kind: type[GQA]
    set_values: Callable[..., None]
    options: tuple[tuple[str, object], ...] = ()
    exact: bool = True  # bit for bit, else within 1e-6 of the largest output


PARENTS = {
    "gated by head": Parent(GatedAttention, at_gate_one, (("gate", "head"),)),
    "gated by element": Parent(GatedAttention, at_gate_one, (("gate", "element"),)),
    "sink": Parent(SinkAttention, at_minus_infinity, exact=False),
    "differential": Parent(DifferentialAttention, at_lambda_zero, exact=False),
    "forgetting": Parent(ForgettingAttention, at_gates_of_one, exact=False),
    "exclusive": Parent(ExclusiveAttention, at_its_option, (("strength", 0.0),)),
    "key_shift": Parent(KeyShiftAttention, at_its_option, (("share", 0.0),)),
    "short_conv": Parent(ShortConvAttention, at_taps_zero, (("width", 4),)),
    "value_residual": Parent(ValueResidualAttention, at_own_values),
}


@pytest.mark.parametrize("name", PARENTS)
@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("scheme", [Position, Slope])
@torch.no_grad()
def test_it_is_grouped_query_attention_at_the_stated_value(
    name: str, n_kv_heads: int, scheme: type[Position]
) -> None:
    parent = PARENTS[name]
    attention = made(parent.kind, n_kv_heads, **dict(parent.options))
    parent.set_values(attention)
    gqa = GQA(SHAPE, 0, n_kv_heads=n_kv_heads, qk_norm=False)
    state = attention.state_dict()
    gqa.load_state_dict({key: state[key] for key in gqa.state_dict()})
    actual, expected = (a(X, scheme(SHAPE).at(POS)) for a in (attention, gqa))
    tolerance = 0.0 if parent.exact else 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@every_extension
@torch.no_grad()
def test_elsewhere_it_is_not(attn: str) -> None:
    ours, mha = moved(build(attn, "rope")), build("mha", "rope")
    own = dict(ours.named_parameters())
    mha.load_state_dict({name: own[name] for name, _ in mha.named_parameters()}, strict=False)
    assert (ours(tokens(2, 16)) - mha(tokens(2, 16))).abs().max() > 1e-3


@torch.no_grad()
def test_a_short_convolution_starts_as_its_parent() -> None:
    assert torch.equal(*(build(attn, "rope")(tokens(2, 16)) for attn in ("short_conv", "mha")))


# Formulas


@pytest.mark.parametrize("gate", ["head", "element"])
@pytest.mark.parametrize("n_kv_heads", [4, 2])
@torch.no_grad()
def test_a_gate_multiplies_each_head_or_each_channel(gate: str, n_kv_heads: int) -> None:
    attention = made(GatedAttention, n_kv_heads, gate=gate)
    y = attention_reference(*projected(attention), POS, POS, None)
    gates = torch.sigmoid(X @ attention.gate.weight.T + attention.gate.bias)  # (B, T, H or D)
    assert gates.size(-1) == {"head": 4, "element": 32}[gate]
    gates = gates.repeat_interleave(32 // gates.size(-1), dim=-1)
    expected = attention.out(y.transpose(1, 2).flatten(2) * gates)
    torch.testing.assert_close(attention(X, plain()), expected)


def sink_reference(attention: SinkAttention, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of tokens, and of the sink, by a softmax over all scores and the sink's logit."""
    q, k, _ = projected(attention)
    k = k.repeat_interleave(4 // attention.n_kv_heads, dim=1)
    scores = q @ k.mT / math.sqrt(8) + (0 if bias is None else bias)
    scores = scores.masked_fill(POS[:, None] < POS, -math.inf)
    sink = attention.sink_bias[:, None, None].expand(2, 4, 16, 1)
    weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)
    return weights[..., :-1], weights[..., -1]


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("scheme", [Position, Slope])
@pytest.mark.parametrize("last", [1, 5, 16])
@torch.no_grad()
def test_a_sink_takes_its_share_of_the_softmax(
    n_kv_heads: int, scheme: type[Position], last: int
) -> None:
    """Whether all queries are computed, a few of the last, or the last alone."""
    attention, position = made(SinkAttention, n_kv_heads), scheme(SHAPE)
    weights, sink = sink_reference(attention, position.bias(POS, POS))
    q, k, v = projected(attention)
    expected = weights @ v.repeat_interleave(4 // n_kv_heads, dim=1)
    actual = attention.attend(q[:, :, -last:], k, v, POS[-last:], POS, position.bias)
    torch.testing.assert_close(actual, expected[:, :, -last:])
    shown = attention.weights(X, position.at(POS))
    torch.testing.assert_close(shown, weights)
    torch.testing.assert_close(1 - shown.sum(dim=-1), sink)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("scheme", [Position, Slope])
@torch.no_grad()
def test_differential_attention_subtracts_a_second_query_of_the_same_head(
    n_kv_heads: int, scheme: type[Position]
) -> None:
    attention, position = made(DifferentialAttention, n_kv_heads), scheme(SHAPE)
    q, k, v = projected(attention)
    bias = position.bias(POS, POS)
    first = attention_reference(q, k, v, POS, POS, bias)
    q = attention.heads(attention.q_subtracted(X), 4)
    second = attention_reference(q, k, v, POS, POS, bias)
    share = torch.sigmoid(attention.subtracted(X))  # (B, T, H)
    expected = output(attention, first - share.mT.unsqueeze(-1) * second)
    torch.testing.assert_close(attention(X, position.at(POS)), expected)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@torch.no_grad()
def test_forgetting_multiplies_what_is_seen_by_all_gates_in_between(n_kv_heads: int) -> None:
    attention = made(ForgettingAttention, n_kv_heads)
    q, k, v = projected(attention)
    gates = torch.sigmoid(attention.forget(X)).mT.repeat_interleave(4 // n_kv_heads, dim=1)
    k, v = (x.repeat_interleave(4 // n_kv_heads, dim=1) for x in (k, v))
    seen = (q @ k.mT / math.sqrt(8)).exp().tril()  # (B, H, T, T)
    for i in range(16):
        for j in range(i):
            seen[:, :, i, j] *= gates[:, :, j + 1 : i + 1].prod(dim=-1)
    weights = seen / seen.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attention.weights(X, plain()), weights, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(attention(X, plain()), output(attention, weights @ v))


@torch.no_grad()
def test_forgetting_in_bfloat16_keeps_the_digits_of_a_long_sum() -> None:
    """Of a sum near 500, which alone is rounded to a multiple of 2; the gates change it by 0.1."""
    attention, x = made(ForgettingAttention), X.clone()
    attention.forget.weight.zero_()
    attention.forget.weight[:, 0] = 100.0
    x[:, :, 0] = 0.02  # a log gate of -0.13 a token
    x[:, 0, 0] = -5.0  # but -500 at the first
    exact = attention.weights(x, plain())
    with torch.autocast("cpu", torch.bfloat16):
        rounded = attention.weights(x, plain())
    assert (rounded - exact).abs().max() < 0.05


def test_forget_gates_have_the_gradient_of_the_whole_bias() -> None:
    """Though c_i is detached: it adds the same to all scores of a query."""
    attention = made(ForgettingAttention)
    q, k, v = projected(attention)
    c = F.logsigmoid(attention.forget(X)).mT.cumsum(dim=-1)  # (B, H, T)
    scores = q @ k.mT / math.sqrt(8) + c[..., :, None] - c[..., None, :]
    weights = scores.masked_fill(POS[:, None] < POS, -math.inf).softmax(dim=-1)
    gates = list(attention.forget.parameters())
    expected = torch.autograd.grad(output(attention, weights @ v).square().sum(), gates)
    actual = torch.autograd.grad(attention(X, plain()).square().sum(), gates)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@torch.no_grad()
def test_exclusive_output_has_no_part_along_the_own_value(n_kv_heads: int) -> None:
    attention = made(ExclusiveAttention, n_kv_heads, strength=1.0)
    q, k, v = projected(attention)
    y = attention_reference(q, k, v, POS, POS, None)
    own = v.repeat_interleave(4 // n_kv_heads, dim=1)
    along = (y * own).sum(dim=-1, keepdim=True) * own / own.square().sum(dim=-1, keepdim=True)
    torch.testing.assert_close(attention(X, plain()), output(attention, y - along))
    rest = attention.finish(y, X, v)
    assert (rest * own).sum(dim=-1).abs().max() < 1e-6 * own.square().sum(dim=-1).max()
    first = rest[:, :, 0].abs().max()
    assert first < 1e-6 * own.abs().max()  # the first token sees nothing but itself


@pytest.mark.parametrize("share", [0.5, 0.25, 1.0])
@torch.no_grad()
def test_the_last_channels_of_a_key_are_those_of_the_token_before(share: float) -> None:
    attention = made(KeyShiftAttention, 2, share=share)
    q, k, v = projected(attention)
    w = round(8 * share)
    shifted = k.clone()
    for t in range(1, 16):
        shifted[:, :, t, 8 - w :] = k[:, :, t - 1, 8 - w :]
    expected = attention_reference(q, shifted, v, POS, POS, None)
    torch.testing.assert_close(attention(X, plain()), output(attention, expected))


@pytest.mark.parametrize("width", [1, 2, 4, 20])
@torch.no_grad()
def test_a_short_convolution_is_torchs_beside_the_identity(width: int) -> None:
    conv, x = ShortConv(32, width), X
    conv.taps.copy_(random(width, 32, seed=1))
    kernel = conv.taps.flip(0).T.unsqueeze(1)  # (C, 1, W), the oldest token first
    padded = F.pad(x.mT, (width - 1, 0))
    expected = x + F.conv1d(padded, kernel, groups=32).mT
    torch.testing.assert_close(conv(x, x.new_zeros(2, width - 1, 32)), expected)


@torch.no_grad()
def test_keys_and_values_are_both_convolved() -> None:
    attention = made(ShortConvAttention, 2, width=3)
    q, k, v = projected(attention)
    k, v = (
        attention.heads(conv(linear(X), X.new_zeros(2, 2, 16)), 2)
        for conv, linear in (
            (attention.k_conv, attention.k),
            (attention.v_conv, attention.v),
        )
    )
    expected = attention_reference(q, k, v, POS, POS, None)
    torch.testing.assert_close(attention(X, plain()), output(attention, expected))


@torch.no_grad()
def test_values_mix_in_those_of_the_first_layer() -> None:
    layers = [made(ValueResidualAttention, 2, seed=seed) for seed in range(3)]
    inputs, positions = [random(2, 16, 32, seed=seed) for seed in range(3)], plain()
    first = projected(layers[0], inputs[0])[2]
    for attention, x in zip(layers, inputs, strict=True):
        q, k, v = projected(attention, x)
        own, other = attention.mix_bias + 0.5
        expected = attention_reference(q, k, own * v + other * first, POS, POS, None)
        torch.testing.assert_close(attention(x, positions), output(attention, expected))


def test_later_layers_send_the_values_of_the_first_a_gradient() -> None:
    first, second = (made(ValueResidualAttention, seed=seed) for seed in range(2))
    positions = plain()
    first(X, positions)
    second(random(2, 16, 32, seed=1), positions).square().sum().backward()
    assert first.v.weight.grad is not None
    assert first.v.weight.grad.abs().max() > 1e-3


@torch.no_grad()
def test_the_first_layer_is_the_first_of_the_mechanism() -> None:
    """In a pattern whose first two layers have a window."""
    model = build("pattern", "rope", "attn@attn.global=value_residual", "model.n_layers=6")
    seen: dict[int, tuple[Tensor, Positions]] = {}
    for attention in model.attention_layers[2::3]:
        attention.register_forward_hook(lambda m, args, _: seen.update({m.layer: args[:2]}))
    model(tokens(2, 16))
    first, (x, positions) = model.attention_layers[2], seen[2]
    assert torch.equal(seen[5][1].shared["values"], first.heads(first.v(x), 4))
    assert seen[5][1].shared is positions.shared


def test_values_are_freed_after_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """With blocks computed again, which hold the positions, which hold the values, which hold them."""
    passes, at = [], RoPE.at

    def observed(self: RoPE, pos: Tensor) -> Positions:
        positions = at(self, pos)
        passes.append(weakref.ref(positions))
        return positions

    monkeypatch.setattr(RoPE, "at", observed)
    model = build("value_residual", "rope", "memory=lean").train()
    loss = model(tokens(2, 16)).square().sum()
    assert passes[0]() is not None
    loss.backward()
    del loss
    gc.collect()
    assert [ref() for ref in passes] == [None]


# In a model, with parameters away from their start


def moved(model: Transformer) -> Transformer:
    """The model with all vectors and zeros of its attention drawn, which start at one value."""
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".attention." in name and (parameter.dim() < 2 or not parameter.any()):
                noise = torch.empty(parameter.shape).normal_(0, 0.5, generator=drawn)
                parameter.add_(noise.to(parameter.device))
    return model


class MovedVariant(TinyVariant):
    """A tiny variant whose attention has left its start."""

    def model(self, *overrides: str, seed: int = 0, spread: float = 5.0) -> Transformer:
        return moved(super().model(*overrides, seed=seed, spread=spread))


@pytest.mark.parametrize(
    "holds", [causality, decoding, cache_bytes, gradients], ids=lambda holds: holds.__name__
)
@pytest.mark.parametrize("pos", ["rope", "alibi"])
@every_extension
def test_properties_hold_away_from_the_start(
    attn: str, pos: str, holds: Callable[[TinyVariant], None]
) -> None:
    holds(MovedVariant(attn, pos))


@pytest.mark.parametrize(
    ("attn", "options"),
    [
        ("gated", ("attn.gate=element",)),
        ("short_conv", ("attn.width=1",)),
        ("short_conv", ("attn.width=9",)),  # longer than some of the chunks that are read
        ("key_shift", ("attn.share=1",)),
        ("forgetting", ("attn.n_kv_heads=2", "attn.qk_norm=true")),
        ("sink", ("attn.n_kv_heads=1", "attn.qk_norm=true")),
        ("differential", ("attn.n_kv_heads=2", "attn.qk_norm=true")),
        ("exclusive", ("attn.n_kv_heads=2", "attn.strength=0.5")),
        ("value_residual", ("attn.n_kv_heads=2",)),
    ],
)
@pytest.mark.parametrize(
    "holds", [causality, decoding, cache_bytes, flops], ids=lambda holds: holds.__name__
)
def test_options_keep_the_properties(
    attn: str, options: tuple[str, ...], holds: Callable[[TinyVariant], None]
) -> None:
    holds(MovedVariant(attn, "rope", overrides=options))


@every_extension
def test_it_works_as_a_part_of_a_pattern(attn: str) -> None:
    """The last of three layers, after two with a window."""
    variant = MovedVariant("pattern", "rope", overrides=(f"attn@attn.global={attn}",))
    for holds in (causality, decoding, cache_bytes, flops, one_graph):
        holds(variant)


@every_extension
@torch.no_grad()
def test_no_fused_kernel_is_lost(attn: str) -> None:
    """At lengths where grouped-query attention runs one, without a mask of all pairs."""
    model = build(attn, "rope", "model.max_len=600")
    assert choose_kernel("cpu", torch.float32, 600, width=8, biased=False, p=0.0) == "flash"
    assert set(training_kernels(model, "cpu", torch.float32, 600)) == {"flash"}
    with torch.profiler.profile(record_shapes=True) as recorded:
        model(tokens(1, 600))
    flash = [e for e in recorded.events() if e.name.endswith("flash_attention_for_cpu")]
    assert len(flash) == 3
    pairs = [
        s for e in recorded.events() for s in e.input_shapes if s[-2:] in ([600, 600], [601] * 2)
    ]
    assert not pairs


def test_a_sink_counts_in_the_length_from_which_a_kernel_is_faster() -> None:
    kernels = {
        attn: training_kernels(build(attn, "rope"), "cpu", torch.float32, 128)[0]
        for attn in ("mha", "sink")
    }
    assert kernels == {"mha": "matmul", "sink": "flash"}


# Refusals


@pytest.mark.parametrize(
    ("attn", "override", "message"),
    [
        ("gated", "attn.gate=channel", "gate=channel must be one of head, element"),
        ("exclusive", "attn.strength=1.5", "strength=1.5 must be at least 0, and at most 1"),
        ("key_shift", "attn.share=-0.5", "share=-0.5 must be at least 0, and at most 1"),
        ("short_conv", "attn.width=0", "width=0 must be at least 1"),
        ("sink", "attn.n_kv_heads=3", "n_kv_heads=3 must divide n_heads=4"),
    ],
)
def test_values_out_of_range_are_refused(attn: str, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(attn, "rope", override)


def test_values_of_other_heads_cannot_be_mixed_in() -> None:
    parts = "attn@attn.local=value_residual attn@attn.global=value_residual".split()
    model = build("pattern", "rope", *parts, "attn.global.n_kv_heads=2")
    with pytest.raises(ValueError, match="n_kv_heads=2 must be 4, that of the first layer"):
        model(tokens(1, 4))


@every_extension
def test_none_has_a_home_in_transformers(attn: str) -> None:
    with pytest.raises(ValueError, match=f"LlamaForCausalLM has no attn={attn}") as refused:
        home_of(composed(f"attn={attn}", "pos=rope", "model=llama"))
    assert "\n" not in str(refused.value)


def test_groups_of_twice_the_context_are_grouped_query_attention() -> None:
    text = tokens(2, 16)
    groups, whole = build("shifted_groups", "rope", "attn.group=32"), build("mha", "rope")
    torch.testing.assert_close(groups(text), whole(text))


def test_tokens_see_their_group_and_through_shifted_heads_the_one_before() -> None:
    """The first layer alone: groups of 4, those of the second half of the heads begin at 2, 6, ..."""
    model = build("shifted_groups", "none", "attn.group=4")
    attention = model.attention_layers[0]
    x = torch.randn(1, 16, 32, generator=torch.Generator().manual_seed(0))
    weights = attention.weights(x, model.position.at(torch.arange(16)))[0]  # (H, T, S)
    query, key = torch.arange(16)[:, None], torch.arange(16)
    for head, seen in enumerate(weights > 0):
        shift = 2 * (head // 2)
        assert torch.equal(seen, (key <= query) & ((key + shift) // 4 == (query + shift) // 4))
    pairs = 16 * attention.score_flops(16, causal=True) / attention.score_flops(1, causal=False)
    assert pairs == (weights > 0).sum() / 4 - 16 / 2  # of each query with its own key, half


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="group=1 must be at least 2"):
        build("shifted_groups", "rope", "attn.group=1")
    with pytest.raises(ValueError, match="n_kv_heads=1 must be even"):
        build("shifted_groups", "rope", "attn.n_kv_heads=1")
