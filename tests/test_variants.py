"""What every attention must hold with every position scheme, found from the config folders."""

import pytest
import torch
from tiny import VOCAB, build, tokens, variants
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model.cache import KVCache

BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


def train_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x).float().flatten(0, 1), y.flatten())


@variants
def test_no_logit_depends_on_a_later_token(attn: str, pos: str) -> None:
    model, x = build(attn, pos), tokens(2, 16)
    before = model(x)
    for t in (1, 7, 15):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@variants
def test_a_late_logit_depends_on_every_earlier_token(attn: str, pos: str) -> None:
    model = build(attn, pos)
    embedded = model.embed(tokens(1, 16)).detach().requires_grad_()
    model.embed = nn.Identity()
    model(embedded)[0, -1].sum().backward()
    assert (embedded.grad[0].abs().sum(dim=-1) > 0).all()


@variants
def test_every_parameter_gets_a_gradient(attn: str, pos: str) -> None:
    model = build(attn, pos, "model.bias=true", "model.tie_embeddings=false").train()
    train_loss(model, tokens(2, 16), tokens(2, 16, seed=1)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@variants
@pytest.mark.parametrize("chunks", [[8, *[1] * 8], [1] * 16, [5, 4, 1, 6]], ids=str)
def test_decoding_with_a_cache_equals_the_full_forward(
    attn: str, pos: str, chunks: list[int]
) -> None:
    model, x = build(attn, pos), tokens(3, 16)
    cache = KVCache(model.shape.n_layers, 16)
    with torch.no_grad():
        pieces = [model(part, cache) for part in x.split(chunks, dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), model(x), atol=1e-5, rtol=1e-4)
    assert len(cache) == 16


@variants
def test_the_cache_holds_exactly_what_the_mechanism_says(attn: str, pos: str) -> None:
    model = build(attn, pos)
    cache = KVCache(model.shape.n_layers, 16)
    with torch.no_grad():
        model(tokens(3, 5), cache)
    elements = sum(m.cache_elements for m in model.mechanisms)
    assert cache.nbytes == 3 * 5 * elements * 4  # float32


@variants
def test_flops_equal_those_that_torch_counts(attn: str, pos: str) -> None:
    model, x, y = build(attn, pos).train(), tokens(2, 16), tokens(2, 16, seed=1)
    with FlopCounterMode(display=False) as counter:
        train_loss(model, x, y).backward()
    assert counter.get_total_flops() == x.numel() * model.flops_per_token(16, causal=False)
    causal, square = model.flops_per_token(16), model.flops_per_token(16, causal=False)
    scores = 3 * sum(m.score_flops(16, False) for m in model.mechanisms)
    assert square - causal == scores / 2


@variants
def test_the_forward_is_one_graph(attn: str, pos: str) -> None:
    model, x = build(attn, pos), tokens(2, 16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_the_real_compiler_agrees() -> None:
    model, x, y = build("gqa", "rope").train(), tokens(2, 16), tokens(2, 16, seed=1)
    torch.compiler.reset()
    expected = train_loss(model, x, y)
    model.compile(fullgraph=True)
    loss = train_loss(model, x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)


@variants
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_steps_of_training_lower_the_loss(attn: str, pos: str, dtype: str) -> None:
    model, x, y = build(attn, pos).train(), tokens(4, 16), tokens(4, 16, seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = train_loss(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@variants
def test_bfloat16_stays_near_float32(attn: str, pos: str) -> None:
    model, x, y = build(attn, pos), tokens(4, 16), tokens(4, 16, seed=1)
    with torch.no_grad(), BFLOAT16:
        half = train_loss(model, x, y)
    torch.testing.assert_close(half, train_loss(model, x, y), rtol=2e-3, atol=0)


@variants
def test_variants_share_the_start_of_the_tensors_they_share(attn: str, pos: str) -> None:
    mine, baseline = build(attn, pos), build("mha", "none")
    theirs = dict(baseline.named_parameters())
    shared = [n for n, p in mine.named_parameters() if n in theirs and theirs[n].shape == p.shape]
    assert {"embed.weight", "blocks.1.feedforward.up.weight"} <= set(shared)
    for name in shared:
        assert torch.equal(mine.get_parameter(name), theirs[name]), name
    other = build(attn, pos, seed=1)
    assert not torch.equal(other.embed.weight, mine.embed.weight)
