"""FlexAttention, as far as a CPU can try it: its mathematics with gradients, its kernel without.

torch refuses to differentiate it on a CPU by a check alone, which these tests switch off.
"""

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import build, tokens
from torch import Tensor

from model.cost import training_kernels
from model.ops.attention import attention_reference
from model.ops.flex_attention import flex_attention
from train.config.compose import choices_of
from train.config.schema import Config
from train.measure.device import Device
from train.setup.run_setup import check, check_flex

H, T = 4, 150  # more than a block, and not a multiple of one
BACK = torch.arange(T)[:, None] - torch.arange(T)


@pytest.fixture
def differentiable(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention has gradients on a CPU."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)


@pytest.fixture
def _anywhere(differentiable: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel is refused for its device."""
    monkeypatch.setattr("model.attention.kernel.refusal", lambda *_, **__: "")
    monkeypatch.setattr("model.attention.base.refusal", lambda *_, **__: "")
    torch.compiler.reset()


def inputs(n_kv_heads: int) -> tuple[Tensor, ...]:
    """Queries, keys, wider than values, and a bias by distance, all with gradients."""
    torch.manual_seed(0)
    shapes = ((2, H, T, 24), (2, n_kv_heads, T, 24), (2, n_kv_heads, T, 16), (H, T))
    return tuple(torch.randn(shape).requires_grad_() for shape in shapes)


def expected(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None) -> Tensor:
    pos = torch.arange(T)
    added = torch.zeros(H, T, T) if bias is None else bias[:, BACK.clamp(min=0)]
    if window is not None:
        added = added.masked_fill(window <= BACK, -math.inf)
    return attention_reference(q, k, v, pos, pos, added)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 1, 7, 140])
@pytest.mark.parametrize(("n_kv_heads", "biased"), [(4, True), (2, True), (1, False)])
def test_it_is_attention_with_all_its_gradients(
    n_kv_heads: int, biased: bool, window: int | None, differentiable: None
) -> None:
    *qkv, bias = inputs(n_kv_heads)
    leaves = [*qkv, bias] if biased else qkv
    found = []
    for attention in (flex_attention, expected):
        y = attention(*qkv, bias if biased else None, window)
        weights = torch.arange(y.numel()).view_as(y).cos()
        found.append([y, *torch.autograd.grad((y * weights).sum(), leaves)])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler of torch needs g++")
@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_that_torch_makes_of_it_computes_the_same(window: int | None) -> None:
    torch.compiler.reset()
    *qkv, bias = (x.detach() for x in inputs(2))
    qkv[2] = torch.cat((qkv[2], qkv[2][..., :8]), dim=-1)  # values as wide as keys
    y = torch.compile(flex_attention, fullgraph=True)(*qkv, bias, window)
    torch.testing.assert_close(y, expected(*qkv, bias, window), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize(
    ("attn", "pos", "more"),
    [("gqa", "alibi", ""), ("mha", "t5", ""), ("mla", "gaussian", ""), ("gated", "rope", ""),
     ("sliding", "t5", "attn.window=5"), ("sliding", "none", "attn.window=99")],
)  # fmt: skip
def test_a_model_is_the_same_with_it(attn: str, pos: str, more: str) -> None:
    """As one compiled program, with all its gradients; and it is flex that computes it."""
    overrides = ["model.max_len=32", *filter(None, [more])]
    plain = build(attn, pos, *overrides)
    flex = build(attn, pos, *overrides, "kernel=flex")
    assert set(training_kernels(flex, "cuda", torch.float32, 32)) == {"flex"}
    x, found, programs = tokens(2, 32), [], list[str]()

    def backend(program: Any, _: Any) -> Any:
        programs.append(program.code)
        return program.forward  # as torch would compute it, one operator after the other

    compiled = torch.compile(flex, fullgraph=True, backend=backend)
    for model, call in ((plain, plain), (flex, compiled)):
        loss = call(x).logsumexp(-1).square().mean()
        found.append([loss, *torch.autograd.grad(loss, [*model.parameters()], allow_unused=True)])
    for actual, wanted in zip(*found, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    assert [program.count("torch.ops.higher_order.flex_attention(") for program in programs] == [3]
    torch.testing.assert_close(flex(x), plain(x))  # not compiled: as ever


@pytest.mark.parametrize("pos", choices_of("pos"))
def test_a_bias_is_by_distance_where_a_scheme_says_so(pos: str) -> None:
    scheme = build("mha", pos).position
    now, later = torch.arange(8), torch.arange(8) + 5
    near, far = scheme.bias(now, now), scheme.bias(later, later)
    if near is None or far is None:
        assert not scheme.by_distance
    else:
        assert scheme.by_distance == torch.allclose(near, far)


@pytest.mark.usefixtures("_anywhere")
@pytest.mark.parametrize(
    ("ask", "compiled", "deterministic", "refused"),
    [
        ("pos=alibi", False, False, "kernel=flex needs compile=true"),
        ("attn=sink pos=rope", True, False, "SinkAttention does not give it"),
        ("attn=gqa tune=prefix", True, False, "whole texts"),
        ("attn=mha model.latents=8", True, False, "whole texts"),
        ("pos=t5", True, True, "deterministic=true needs another"),
        ("attn=rank attn.rank=8", True, False, "at least 16 channels, not 8"),
    ],
)
def test_what_it_cannot_train(ask: str, compiled: bool, deterministic: bool, refused: str) -> None:
    attn, pos, more = "mha", "rope", []
    for override in ask.split():
        key, _, value = override.partition("=")
        attn = value if key == "attn" else attn
        pos = value if key == "pos" else pos
        more += [override] if key not in ("attn", "pos") else []
    model = build(attn, pos, "model.dim=64", *more, "kernel=flex")
    with pytest.raises(ValueError, match=refused):
        check_flex(model, Device("cuda", torch.float32, compiled), deterministic)


def test_a_bias_that_says_nothing_of_distance_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mha", "alibi", "model.dim=64", "kernel=flex")
    device = Device("cuda", torch.float32, compiled=True)
    check_flex(model, device, deterministic=True)
    monkeypatch.setattr("model.position.alibi.ALiBi.by_distance", False)
    with pytest.raises(ValueError, match="ALiBi does not say so"):
        check_flex(model, device, deterministic=True)


def test_a_cpu_is_told_that_it_has_no_such_kernel(config: Callable[..., Config]) -> None:
    with pytest.raises(ValueError, match="kernel=flex exists on CUDA alone"):
        check(config("kernel=flex", "compile=true"))


@pytest.mark.usefixtures("_anywhere")
def test_it_is_for_whole_texts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    layer = build("gqa", "rope", "kernel=flex").attention_layers[0]
    q, k = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    assert layer.in_flex(q, k, 0.0)
    assert not layer.in_flex(q[:, :, :2], k, 0.0)
    assert not build("gqa", "rope").attention_layers[0].in_flex(q, k, 0.0)
