"""Gated linear attention and the gated delta rule: chunks against steps, exact cases, costs, hybrids."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import RUN, build, tokens
from torch import Tensor
from torch.nn import functional as F

from cli.evaluate import evaluate
from compare.check.properties import (
    PROPERTIES,
    TinyVariant,
    cache_bytes,
    composed,
    decoding,
    flops,
)
from model.attention.recurrent.gated_delta import GatedDelta
from model.attention.recurrent.gla import GLA, LOWEST
from model.ops.linear_attention import (
    delta,
    delta_reference,
    gla,
    gla_reference,
    unit_lower_inverse,
)
from model.shape import Shape
from train.config.compose import compose
from train.measure.device import Device
from train.run import run_training
from train.setup.huggingface import home_of

MIXERS = ("gla", "gated_delta")
SHAPE = Shape(dim=32, n_heads=4, n_layers=1, max_len=16, vocab_size=5)
HYBRID = ("attn@attn.local=gated_delta", "attn@attn.global=mha")
BFLOAT16 = Device("cpu", torch.bfloat16)
B, H, DK, DV = 2, 3, 4, 6

lengths = pytest.mark.parametrize("length", [1, 5, 63, 64, 65, 130])
chunks = pytest.mark.parametrize("chunk", [1, 7, 64])


def random(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


def gla_inputs(length: int) -> tuple[Tensor, ...]:
    """q, k, v and log gates; some of these stay at the lowest for long."""
    q, k = random(2, B, H, length, DK)
    log_gate = (F.logsigmoid(8 * random(B, H, length, DK, seed=2)) / 16).clamp(min=LOWEST)
    log_gate[:, 0] = LOWEST
    return q, k, random(B, H, length, DV, seed=1), log_gate


def delta_inputs(length: int) -> tuple[Tensor, ...]:
    """q, keys of length 1, v, log gates and rates; the first head's keys are all the same."""
    q, k = random(2, B, H, length, DK)
    k = F.normalize(k, dim=-1)
    k[:, 0] = k[:, 0, :1]
    log_gate = -2 * random(B, H, length, seed=2).sigmoid()
    log_gate[:, 0] = 0
    rate = (4 * random(B, H, length, seed=3)).sigmoid()
    return q, k, random(B, H, length, DV, seed=1), log_gate, rate


# Chunks against steps


@lengths
@chunks
@pytest.mark.parametrize("name", MIXERS)
def test_chunks_give_what_the_recurrence_gives(name: str, length: int, chunk: int) -> None:
    fast, reference = (gla, gla_reference) if name == "gla" else (delta, delta_reference)
    inputs = gla_inputs(length) if name == "gla" else delta_inputs(length)
    for state in (torch.zeros(B, H, DK, DV), random(B, H, DK, DV, seed=5)):
        expected, last = reference(*inputs, state)
        y, kept = fast(*inputs, state, chunk, True)
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(kept, last, rtol=0, atol=1e-4)
    nothing_before, _ = fast(*inputs, None, chunk, False)
    expected, _ = reference(*inputs, torch.zeros(B, H, DK, DV))
    torch.testing.assert_close(nothing_before, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", MIXERS)
def test_their_gradients_are_those_of_the_recurrence(name: str) -> None:
    fast, reference = (gla, gla_reference) if name == "gla" else (delta, delta_reference)
    inputs = gla_inputs(21) if name == "gla" else delta_inputs(21)
    inputs = tuple(x.double().requires_grad_() for x in (*inputs, random(B, H, DK, DV, seed=5)))
    grad = random(B, H, 21, DV, seed=6).double()
    expected = torch.autograd.grad(reference(*inputs)[0], inputs, grad)
    for ours, other in zip(
        torch.autograd.grad(fast(*inputs, 8, False)[0], inputs, grad), expected, strict=True
    ):
        torch.testing.assert_close(ours, other)


@torch.no_grad()
@pytest.mark.parametrize("attn", MIXERS)
def test_a_prompt_may_be_read_in_parts_of_any_size(attn: str) -> None:
    variant = TinyVariant(attn, "none")
    model, x = variant.model(), variant.tokens(2, 200)
    full = model(x)
    for parts in ([1, 63, 64, 65, 7], [130, 70], [199, 1], [1] * 200):
        cache = model.new_cache(200)
        pieces = torch.cat([model(part, cache) for part in x.split(parts, dim=1)], dim=1)
        torch.testing.assert_close(pieces, full, rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_chunk_changes_no_result() -> None:
    for attn in MIXERS:
        x = TinyVariant(attn, "none").tokens(2, 100)
        models = [
            TinyVariant(attn, "none", overrides=(f"attn.chunk={c}",)).model() for c in (9, 64)
        ]
        torch.testing.assert_close(models[0](x), models[1](x), rtol=0, atol=1e-4)


# Exact cases


def test_gates_of_1_are_plain_linear_attention() -> None:
    q, k, v, log_gate = gla_inputs(40)
    y, state = gla(q, k, v, torch.zeros_like(log_gate), None, 16, True)
    torch.testing.assert_close(y, (q @ k.mT).tril() @ v, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, k.mT @ v, rtol=1e-4, atol=1e-4)


def test_the_longest_chunk_at_the_lowest_gate_stays_finite() -> None:
    q, k, v, log_gate = (x.requires_grad_() for x in gla_inputs(64))
    y, _ = gla(100 * q, 100 * k, v, torch.full_like(log_gate, LOWEST), None, 64, False)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_the_delta_rule_overwrites_the_value_at_a_key_and_leaves_orthogonal_ones() -> None:
    """Without decay and at rate 1, the state is a table of the last value at each key."""
    keys = torch.eye(3)[[0, 1, 0, 2, 1, 0]][None, None]  # (1, 1, 6, 3)
    values = random(1, 1, 6, 5)
    nothing, all_of_it = torch.zeros(1, 1, 6), torch.ones(1, 1, 6)
    y, table = delta(keys, keys, values, nothing, all_of_it, None, 4, True)
    torch.testing.assert_close(y, values)
    torch.testing.assert_close(table[0, 0], values[0, 0, [5, 4, 3]])
    _, half = delta(keys, keys, values, nothing, all_of_it / 2, None, 4, True)
    expected = values[0, 0, 3] / 2
    torch.testing.assert_close(half[0, 0, 2], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 8, 64])
def test_the_inverse_keeps_its_digits_for_keys_that_are_all_the_same(size: int) -> None:
    """L is all ones: the inverse has 1 on the diagonal and -1 below it, powers of L reach 10^18."""
    lower = torch.ones(2, size, size).tril(-1)
    expected = torch.eye(size) - torch.diag(torch.ones(size - 1), -1)
    torch.testing.assert_close(unit_lower_inverse(lower), expected.expand(2, -1, -1))
    other = random(2, size, size).tril(-1) / 4
    product = unit_lower_inverse(other) @ (torch.eye(size) + other)
    torch.testing.assert_close(product, torch.eye(size).expand(2, -1, -1), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_short_convolution_is_a_causal_one_per_channel() -> None:
    mixer = GatedDelta(SHAPE, 0, conv=3, chunk=64)
    mixer.taps.copy_(random(3, 96))
    x = random(2, 10, 96, seed=1)
    kernel = mixer.taps.flip(0).T[:, None]  # (C, 1, K), its last tap on the token itself
    expected = x + F.conv1d(F.pad(x.mT, (2, 0)), kernel, groups=96).mT
    y, last = mixer.convolved(x, None)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(last, x[:, -2:])
    one, before = mixer.convolved(x[:, :1], None)
    rest, _ = mixer.convolved(x[:, 1:], before)
    torch.testing.assert_close(torch.cat((one, rest), dim=1), expected)


def test_gates_start_where_the_papers_start_them() -> None:
    x = torch.zeros(1, 1, 32)
    mixer = build("gated_delta", "none").attention_layers[0]
    assert mixer.log_gate(x).flatten().tolist() == pytest.approx([-0.01, -0.06, -0.11, -0.16])
    assert math.exp(math.log(0.5) / 16) == pytest.approx(0.958, abs=5e-4)


# Costs and options


@pytest.mark.parametrize(
    ("attn", "overrides"),
    [
        ("gla", ("attn.chunk=5",)),
        ("gla", ("attn.chunk=4", "attn.key_dim=3")),
        ("gated_delta", ("attn.chunk=5",)),
        ("gated_delta", ("attn.chunk=8", "attn.conv=1")),
        ("gated_delta", ("attn.chunk=1",)),
    ],
)
def test_flops_are_exact_whatever_the_chunk(attn: str, overrides: tuple[str, ...]) -> None:
    flops(TinyVariant(attn, "none", overrides=overrides))


def test_flops_are_linear_in_the_length() -> None:
    for attn in MIXERS:
        mixer = build(attn, "none").attention_layers[0]
        per_token = [mixer.score_flops(n, causal=False) for n in (6_400, 64_000)]
        assert per_token[1] == pytest.approx(per_token[0], rel=0.01)
        assert mixer.decode_flops(10) == mixer.decode_flops(100_000)
        assert mixer.decode_flops(10, cached=False) > 5 * mixer.decode_flops(10)


def test_weights_are_those_of_the_papers() -> None:
    D = 192
    shape = Shape(dim=D, n_heads=6, n_layers=1, max_len=16, vocab_size=5, bias=False)
    of_gla = GLA(shape, 0, key_dim=None, gate_rank=16, chunk=64)
    norm = 32
    assert sum(p.numel() for p in of_gla.parameters()) == 4 * D**2 + 16 * (D + D // 2) + norm
    of_delta = GatedDelta(shape, 0, conv=4, chunk=64)
    gates = 2 * 6 * D + 2 * 6
    assert sum(p.numel() for p in of_delta.parameters()) == 5 * D**2 + gates + 4 * 3 * D + norm


@pytest.mark.parametrize(
    ("attn", "held"), [("gla", 4 * 4 * 8), ("gated_delta", 4 * 8 * 8 + 3 * 96)]
)
def test_the_cache_is_constant(attn: str, held: int) -> None:
    model = build(attn, "none")
    cache, sizes = model.new_cache(300), set()
    for part in tokens(1, 300).split([1, 1, 98, 200], dim=1):
        model(part, cache)
        sizes.add(cache.nbytes)
    assert sizes == {3 * 4 * held}  # 3 layers, 4 bytes


@pytest.mark.parametrize("attn", [*MIXERS, "elman", "lstm"])
def test_states_stay_in_float32_in_a_bfloat16_model(attn: str) -> None:
    variant = TinyVariant(attn, "none", BFLOAT16)
    cache_bytes(variant)
    decoding(variant)
    model = variant.model()
    cache = model.new_cache(16)
    with torch.no_grad(), BFLOAT16.autocast():
        model(variant.tokens(1, 16), cache)
    assert {x.dtype for layer in cache.layers for x in layer.state} == {torch.float32}


@torch.no_grad()
@pytest.mark.parametrize("attn", [*MIXERS, "elman", "lstm"])
def test_a_state_keeps_no_other_memory_alive(attn: str) -> None:
    """Not that of the tokens whose last one it is a view of."""
    cache = build(attn, "none").new_cache(16)
    build(attn, "none")(tokens(1, 16), cache)
    for x in (x for layer in cache.layers for x in layer.state):
        assert x.untyped_storage().nbytes() == x.nbytes


def test_options_out_of_range_are_refused() -> None:
    for attn, option, message in (
        ("gla", "chunk=65", "chunk=65 .*from 1 to 64"),
        ("gla", "chunk=0", "chunk=0 .*from 1 to 64"),
        ("gla", "gate_rank=0", "gate_rank=0 must be at least 1"),
        ("gla", "key_dim=0", "key_dim=0 must be at least 1"),
        ("gated_delta", "chunk=0", "chunk=0 must be at least 1"),
        ("gated_delta", "conv=0", "conv=0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            build(attn, "none", f"attn.{option}")


@pytest.mark.parametrize("attn", [*MIXERS, "elman", "lstm"])
def test_no_model_of_transformers_computes_them(attn: str) -> None:
    with pytest.raises(ValueError, match=rf"no model of transformers .* attn={attn}") as refusal:
        home_of(composed(f"attn={attn}", "pos=learned"))
    assert "\n" not in str(refusal.value)


# Hybrids


@pytest.mark.parametrize("holds", PROPERTIES, ids=lambda holds: holds.__name__)
def test_one_layer_of_attention_among_linear_ones_heeds_its_positions(holds: Any) -> None:
    holds(TinyVariant("pattern", "rope", overrides=HYBRID))


def test_a_hybrid_keeps_tokens_only_for_its_attention(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, decoded and asked for attention weights, which two of its three layers lack."""
    run = tmp_path / "run"
    places = [f"data.path={text}", f"data.cache={tmp_path}/cache", f"out={run}"]
    assert run_training(compose([*RUN, *places, "attn=pattern", *HYBRID, "pos=rope"])) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert summary["kernel"] == ["chunks", "chunks", "matmul"]
    assert summary["n_kv_heads"] == [None, None, 4]
    capsys.readouterr()
    sizes = ["batch_sizes=[2]", "contexts=[8,16]", "tokens=3", "repeats=2"]
    assert evaluate([f"run={run}", "eval=decode", *sizes, "dtype=float32", "threads=1"]) == 0
    rows = json.loads((run / "eval/decode.json").read_text())["rows"]
    state, token = 2 * (4 * 8 * 8 + 3 * 96), 2 * 32
    assert [row["cache_bytes"] for row in rows] == [2 * 4 * (state + n * token) for n in (8, 16)]
    with pytest.raises(ValueError, match=r"GatedDelta has no attention weights"):
        evaluate([f"run={run}", "eval=attention", "dtype=float32", "threads=1"])
