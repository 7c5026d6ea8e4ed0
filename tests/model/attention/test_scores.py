"""Theorems and numbers by hand of the attention scores, of Gaussian positions and of merged projections."""

import pytest
import torch
from tiny import build, tokens
from torch import Tensor
from torch.nn import functional as F

from model.attention.base import Attention
from model.attention.grouped import MHA
from model.attention.scores.additive import BLOCK, Additive
from model.attention.scores.blind import Blind
from model.attention.scores.concatenated import Concatenated
from model.attention.scores.merged import Merged
from model.attention.scores.multiplicative import Multiplicative
from model.attention.scores.rank import Rank
from model.ops.attention import attention_weights, masked_softmax
from model.position.alibi import ALiBi, slopes
from model.position.base import Position, Positions
from model.position.gaussian import Gaussian
from model.shape import Shape

SHAPE = Shape(dim=32, n_heads=4, n_layers=1, max_len=16, vocab_size=5)
ONE = Shape(dim=1, n_heads=1, n_layers=1, max_len=4, vocab_size=5, bias=False)  # one channel


@pytest.fixture(autouse=True)
def _same_parameters() -> None:
    torch.manual_seed(0)


def plain(length: int, shape: Shape = SHAPE) -> Positions:
    """Positions that neither rotate nor add."""
    return Position(shape).at(torch.arange(length))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(attention: Attention, **weights: float) -> Tensor:
    """What the last of two tokens, 0 and 1, looks at in one channel, with all of a weight this number."""
    with torch.no_grad():
        for name, value in weights.items():
            attention.get_parameter(name.replace("__", ".")).fill_(value)
        return attention.weights(torch.tensor([[[0.0], [1.0]]]), plain(2, ONE))[0, 0, 1]


@pytest.mark.parametrize(("attn", "pos"), [("mha", "rope"), ("gqa", "rope"), ("mha", "alibi")])
@torch.no_grad()
def test_multiplicative_scores_fold_into_the_query_projection(attn: str, pos: str) -> None:
    """With every head's W times its query projection, multi-head attention computes the same."""
    plain_model = build(attn, pos, "model.bias=true")
    kv_heads = plain_model.attention_layers[0].n_kv_heads
    model = build("multiplicative", pos, "model.bias=true", f"attn.n_kv_heads={kv_heads}")
    for number, parameter in enumerate(model.parameters()):
        parameter.copy_(0.1 * random(*parameter.shape, seed=number))
    weights = model.state_dict()
    for layer in range(3):
        name = f"blocks.{layer}.attention"
        W = torch.eye(8) + weights.pop(f"{name}.score.weight").unflatten(0, (4, 8))  # (H, Dh, Dh)
        for part in ("weight", "bias"):
            q = weights[f"{name}.q.{part}"]
            weights[f"{name}.q.{part}"] = (W @ q.reshape(4, 8, -1)).reshape(q.shape)
    x = tokens(2, 16)
    before = plain_model(x)
    plain_model.load_state_dict(weights)
    torch.testing.assert_close(model(x), plain_model(x), rtol=0, atol=1e-5)
    assert (plain_model(x) - before).abs().max() > 0.1


def test_multiplicative_scores_by_hand() -> None:
    """Keys 0 and 1, query 0.5: W = 2 doubles the score of the dot product."""
    multiplicative = Multiplicative(ONE, 0, n_kv_heads=None)
    weights = by_hand(multiplicative, q__weight=0.5, k__weight=1.0, score__weight=1.0)  # W - I
    torch.testing.assert_close(weights[1].item(), 0.731059, rtol=0, atol=1e-6)
    weights = by_hand(MHA(ONE, 0, qk_norm=False), q__weight=0.5, k__weight=1.0)
    torch.testing.assert_close(weights[1].item(), 0.622459, rtol=0, atol=1e-6)


def test_only_with_tied_projections_does_a_matrix_between_query_and_key_add_anything() -> None:
    """Tied projections alone give symmetric scores; a matrix between them gives others too."""
    multiplicative = Multiplicative(SHAPE, 0, n_kv_heads=None)
    with torch.no_grad():
        for name in ("weight", "bias"):
            shared = random(*multiplicative.q.get_parameter(name).shape)
            multiplicative.q.get_parameter(name).copy_(shared)
            multiplicative.k.get_parameter(name).copy_(shared)
        x = random(1, 6, 32, seed=1)
        asymmetry = []
        for matrix in (torch.zeros(32, 8), random(32, 8, seed=2)):
            multiplicative.score.weight.copy_(matrix)
            q, k, _ = multiplicative.project(x, plain(6))
            scores = q @ k.mT
            asymmetry.append((scores - scores.mT).abs().max().item())
    assert asymmetry[0] < 1e-3
    assert asymmetry[1] > 1


def literal_concatenated(
    attention: Concatenated, x: Tensor, query: Tensor, w_query: Tensor
) -> Tensor:
    """Attention with w . [k; q] written out, for a query projection (D, D) and its half of w (H, Dh)."""
    q, k, v = (
        (x @ weight.mT + bias).unflatten(-1, (4, 8)).transpose(1, 2)
        for weight, bias in (
            (query, torch.zeros(32)),
            (attention.k.weight, attention.k.bias),
            (attention.v.weight, attention.v.bias),
        )
    )
    T = x.size(1)
    keys, queries = (
        k[:, :, None].expand(-1, -1, T, -1, -1),
        q[:, :, :, None].expand(-1, -1, -1, T, -1),
    )
    both = torch.cat((keys, queries), dim=-1)  # (B, H, T, T, 2 Dh)
    w = torch.cat((attention.score.weight, w_query), dim=-1)  # (H, 2 Dh)
    scores = (both * w[:, None, None]).sum(-1)  # (B, H, T, T)
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
    y = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ v
    return attention.out(y.transpose(1, 2).flatten(2))


def test_concatenated_scores_do_not_depend_on_the_query() -> None:
    """The written-out formula gives the same output, and its query's half gets no gradient."""
    attention, x = Concatenated(SHAPE, 0, n_kv_heads=None), random(2, 9, 32)
    query, w_query = random(32, 32, seed=1).requires_grad_(), random(4, 8, seed=2).requires_grad_()
    literal = literal_concatenated(attention, x, query, w_query)
    torch.testing.assert_close(literal, attention(x, plain(9)), rtol=0, atol=1e-5)
    literal.square().sum().backward()
    assert w_query.grad.abs().max() < 1e-4  # type: ignore[union-attr]
    assert query.grad.abs().max() < 1e-4  # type: ignore[union-attr]
    assert attention.score.weight.grad.abs().max() > 0.1  # type: ignore[union-attr]


@torch.no_grad()
def test_concatenated_weights_are_the_same_for_every_query_that_sees_the_same_keys() -> None:
    """Up to the keys in sight: the weights of a later query, renormalised over fewer keys."""
    attention = Concatenated(SHAPE, 0, n_kv_heads=2)
    weights = attention.weights(3 * random(2, 9, 32), plain(9))
    last = weights[:, :, -1:]
    for t in range(9):
        seen = last[..., : t + 1]
        torch.testing.assert_close(
            weights[:, :, t, : t + 1], (seen / seen.sum(-1, keepdim=True))[:, :, 0]
        )
    assert weights[:, :, -1].std() > 0.01  # and they are not uniform


@pytest.mark.parametrize("size", [0.5, -3.0])
def test_concatenated_scores_by_hand(size: float) -> None:
    """Keys 0 and 1 and w = (1, 1): the second weight is 0.731059, whatever the query is."""
    attention = Concatenated(ONE, 0, n_kv_heads=None)
    weights = by_hand(attention, k__weight=1.0, score__weight=1.0)
    torch.testing.assert_close(weights[1].item(), 0.731059, rtol=0, atol=1e-6)
    literal = torch.tensor([0.0 + size, 1.0 + size]).softmax(-1)
    torch.testing.assert_close(weights, literal)


def test_concatenated_scores_cache_one_number_a_head_and_no_keys() -> None:
    attention = Concatenated(SHAPE, 0, n_kv_heads=2)
    cache = attention.new_cache(16)
    attention(random(3, 5, 32), plain(5), cache)
    assert [buffer.shape for buffer in cache.buffers] == [(3, 4, 16, 1), (3, 2, 16, 8)]
    assert attention.cache_elements(5) == 5 * (2 * 8 + 4)


def additive(
    shape: Shape = SHAPE, width: int | None = None, n_kv_heads: int | None = None
) -> Additive:
    """Additive attention with a drawn w."""
    attention = Additive(shape, 0, width=width, n_kv_heads=n_kv_heads)
    with torch.no_grad():
        attention.w.copy_(random(*attention.w.shape, seed=9))
    return attention


@pytest.mark.parametrize("T", [5, 2 * BLOCK + 3])
def test_additive_scores_are_the_literal_formula(T: int) -> None:
    """w . tanh(W [k; q]) with keys and queries of head_dim, W = [W_k W_q] of each head (ds, 2 Dh)."""
    attention, x = additive(width=5), random(2, T, 32)
    key, query = random(32, 32, seed=1), random(32, 32, seed=2)
    W = random(4, 5, 16, seed=3)
    with torch.no_grad():
        for part, half, projection in (
            (attention.k, W[..., :8], key),
            (attention.q, W[..., 8:], query),
        ):
            part.weight.copy_((half @ projection.unflatten(0, (4, 8))).flatten(0, 1))
            part.bias.zero_()
    k, q = ((x @ m.mT).unflatten(-1, (4, 8)).transpose(1, 2) for m in (key, query))
    both = torch.cat(
        (k[:, :, None].expand(-1, -1, T, -1, -1), q[:, :, :, None].expand(-1, -1, -1, T, -1)),
        dim=-1,
    )  # (B, H, T, T, 2 Dh)
    hidden = torch.einsum("bhtsc,hdc->bhtsd", both, W).tanh()
    scores = torch.einsum("bhtsd,hd->bhts", hidden, attention.w)
    ahead = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights = scores.masked_fill(ahead, -torch.inf).softmax(-1)
    v = attention.v(x).unflatten(-1, (4, 8)).transpose(1, 2)
    expected = attention.out((weights @ v).transpose(1, 2).flatten(2))
    actual = attention(x, plain(T))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(attention.weights(x, plain(T)), weights, rtol=0, atol=1e-5)
    gradients = [torch.autograd.grad(y.square().sum(), attention.w)[0] for y in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("query", "second"), [(0.5, 0.708077), (-0.5, 0.863947)])
def test_additive_scores_by_hand(query: float, second: float) -> None:
    """One channel, w = 2, keys 0 and 1: unlike concatenated scores, these depend on the query."""
    attention = additive(ONE)
    weights = by_hand(attention, q__weight=query, k__weight=1.0, w=2.0)
    torch.testing.assert_close(weights[1].item(), second, rtol=0, atol=1e-6)
    q, k, _ = attention.project(torch.tensor([[[0.0], [1.0]]]), plain(2, ONE))
    scores = {0.5: [0.924234, 1.810297], -0.5: [-0.924234, 0.924234]}[query]
    torch.testing.assert_close(
        attention.scores(q, k)[0, 0, 1], torch.tensor(scores), rtol=0, atol=1e-6
    )


def test_the_tanh_of_additive_scores_does_not_stay_for_the_backward_pass() -> None:
    attention, kept = additive(width=16), []
    x = random(2, 4 * BLOCK, 32).requires_grad_()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attention(x, plain(4 * BLOCK))
    last_block = 2 * 4 * BLOCK * 4 * BLOCK * 16  # B H BLOCK S ds
    assert max(kept) < last_block


def test_additive_scores_train_as_one_compiled_graph() -> None:
    model, x = build("additive", "alibi", "model.n_layers=1").train(), tokens(2, 16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    losses = [net(x).square().mean() for net in (model, compiled)]
    torch.testing.assert_close(*losses)
    gradients = [torch.autograd.grad(loss, [*model.parameters()]) for loss in losses]
    for eager, traced in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-3, atol=1e-6)
    torch.compiler.reset()


def test_a_width_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="width=0 must be at least 1, or null for head_dim=8"):
        build("additive", "none", "attn.width=0")


def size_of(attention: Attention) -> int:
    return sum(p.numel() for p in attention.parameters())


def test_scores_cost_the_parameters_that_the_table_says() -> None:
    mha, query = size_of(MHA(SHAPE, 0, qk_norm=False)), 32 * 32 + 32
    assert size_of(Multiplicative(SHAPE, 0, n_kv_heads=None)) == mha + 4 * 8 * 8
    assert size_of(Concatenated(SHAPE, 0, n_kv_heads=None)) == mha - query + 4 * 8
    assert size_of(additive()) == mha + 4 * 8
    assert additive(width=3, n_kv_heads=2).cache_elements(5) == 5 * 2 * (3 + 8)


def gaussian(shape: Shape = SHAPE, *, a: list[float], c: list[float]) -> Gaussian:
    """Gaussian positions with this sharpness and these centres in each head."""
    scheme = Gaussian(shape, centres=c, learned=True)
    with torch.no_grad():
        scheme.width_bias.copy_((torch.tensor(a) / scheme.sharpness).log())
    return scheme


@pytest.mark.parametrize(
    ("a", "expected"),
    [
        (1.0, [0.209729, 0.570101, 0.209729, 0.010442]),
        (5.0, [0.006648, 0.986703, 0.006648, 0.0]),
        (20.0, [0.0, 1.0, 0.0, 0.0]),  # the token before
    ],
)
def test_gaussian_weights_by_hand(a: float, expected: list[float]) -> None:
    """Around one token back, without content: weights of query 3 on keys 3, 2, 1 and 0."""
    pos = torch.arange(4)
    bias = gaussian(a=[a] * 4, c=[1.0] * 4).bias(pos, pos)
    weights = masked_softmax(torch.zeros(1, 4, 4, 4), pos, pos, bias)
    for head in weights[0, :, 3].flip(-1):
        torch.testing.assert_close(head, torch.tensor(expected), rtol=0, atol=1e-6)


def test_a_gaussian_bias_is_the_product_of_a_relative_key_and_a_query_of_the_head() -> None:
    """v . r with r = (d^2, d), d = j - i, and v = -a (1, 2 c): the bias, and a c^2 that softmax drops."""
    a, c, pos = (
        torch.tensor([1.0, 0.3, 0.02, 2.0]),
        torch.tensor([0.0, 2.0, 5.0, 1.5]),
        torch.arange(9),
    )
    d = (pos - pos[:, None]).float()
    r = torch.stack((d**2, d), dim=-1)  # (T, S, 2)
    v = -a[:, None] * torch.stack((torch.ones(4), 2 * c), dim=-1)  # (H, 2)
    product = torch.einsum("tsr,hr->hts", r, v)
    bias = gaussian(a=a.tolist(), c=c.tolist()).bias(pos, pos)
    torch.testing.assert_close(product, bias + (a * c**2)[:, None, None], rtol=1e-4, atol=1e-4)


def test_gaussian_positions_start_from_a_sharp_head_on_the_token_to_a_wide_one() -> None:
    model = build("mha", "gaussian")
    scheme = model.position
    assert {name for name, _ in scheme.named_parameters()} == {"centre_bias", "width_bias"}
    start = scheme.bias(torch.arange(16), torch.arange(16))
    expected = Gaussian(SHAPE, centres=None, learned=False)
    assert torch.equal(start, expected.bias(torch.arange(16), torch.arange(16)))
    assert not [*expected.parameters()]
    assert expected.centres.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(expected.sharpness[[0, 3]], torch.tensor([1.0, 1 / 800]))
    ratio = expected.sharpness[1:] / expected.sharpness[:-1]
    torch.testing.assert_close(ratio, ratio[:1].expand(3))
    given = build("mha", "gaussian", "pos.centres=[3,2.5,1,0]", "pos.learned=false").position
    assert given.centres.tolist() == [3, 2.5, 1, 0]


@pytest.mark.parametrize("centres", [[1.0], [0.0, 1.0, 2.0, -1.0], []])
def test_centres_that_do_not_fit_the_heads_are_refused(centres: list[float]) -> None:
    with pytest.raises(ValueError, match=r"centres=.*n_heads=4 numbers, none below 0"):
        Gaussian(SHAPE, centres=centres, learned=True)


def test_blind_attention_with_sharp_centres_is_a_causal_convolution() -> None:
    """Tap h of the kernel is W_v W_out of head h; the text goes on to the left as its first token."""
    blind, T = Blind(SHAPE, 0, n_kv_heads=None), 12
    scheme = gaussian(a=[50.0] * 4, c=[0.0, 1.0, 2.0, 3.0])
    x = random(2, T, 32)
    taps = torch.einsum(
        "ohd,hdi->oih", blind.out.weight.unflatten(1, (4, 8)), blind.v.weight.unflatten(0, (4, 8))
    )  # (D out, D in, H)
    padded = torch.cat((x[:, :1].expand(-1, 3, -1), x), dim=1)
    expected = F.conv1d(padded.mT, taps.flip(-1)).mT + blind.out(blind.v.bias)
    actual = blind(x, scheme.at(torch.arange(T)))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def test_blind_attention_is_the_mean_of_the_past_or_an_exponential_memory() -> None:
    blind, x = Blind(SHAPE, 0, n_kv_heads=None), random(2, 9, 32)
    mean = blind.v(x).cumsum(1) / torch.arange(1, 10)[:, None]
    torch.testing.assert_close(blind(x, plain(9)), blind.out(mean))
    weights = blind.weights(x, ALiBi(SHAPE).at(torch.arange(9)))[0, :, 8]
    decay = torch.tensor(slopes(4)).neg().exp()
    torch.testing.assert_close(weights[:, :-1] / weights[:, 1:], decay[:, None].expand(-1, 8))


def test_blind_attention_weighs_every_text_alike_and_shares_values_as_grouped_attention() -> None:
    blind, x = Blind(SHAPE, 0, n_kv_heads=2), random(3, 9, 32)
    positions = gaussian(a=[0.1, 1.0, 0.3, 0.01], c=[0.0, 1.0, 2.0, 3.0]).at(torch.arange(9))
    weights = blind.weights(x, positions)
    assert weights.shape == (3, 4, 9, 9)
    assert torch.equal(weights[0], weights[2])
    v = blind.v(x).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, dim=1)
    expected = blind.out((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(blind(x, positions), expected)
    blind.dropout = 0.5
    torch.manual_seed(0)
    v = v[:, ::2]
    drawn = torch.stack([blind.weigh(weights[0], v) for _ in range(1000)])
    torch.testing.assert_close(drawn.mean(0), blind.eval().weigh(weights[0], v), rtol=0, atol=0.3)
    one, other = blind.train().weigh(weights[0], v[:1].expand(2, -1, -1, -1))
    assert not torch.equal(one, other)  # each text drops its own


def test_blind_attention_refuses_positions_that_rotate() -> None:
    with pytest.raises(ValueError, match="RoPE acts through `rotate`, which Blind has no use for"):
        build("blind", "rope")


def multiply_adds(attention: Attention, length: int) -> float:
    """Of one head of a layer over a text: its projections into the head, its scores and values."""
    into_head = sum(
        part.weight.numel()
        for name, part in attention.named_children()
        if name != "out" and isinstance(part, torch.nn.Linear)
    )
    scores = attention.score_flops(length, causal=False) / 2
    return length * (into_head + scores) / attention.n_heads


def test_attention_without_content_costs_what_the_derivation_says() -> None:
    """N = 1024 tokens of 768 numbers, heads of 64: 2 N Di Dk + N Di Dv + N^2 (Dk + Dv), and N Di Dv + N^2 Dv."""
    wide = Shape(dim=768, n_heads=12, n_layers=1, max_len=1024, vocab_size=5)
    mha = MHA(wide, 0, qk_norm=False)
    assert multiply_adds(mha, 1024) == 285_212_672
    assert multiply_adds(Blind(wide, 0, n_kv_heads=None), 1024) == 117_440_512
    # 2 H Di Dk + 2 H Dk + H Dv Di + H Dv + Dout H Dv + Dout
    assert size_of(mha) == 2_362_368 == 4 * (768**2 + 768)
    assert size_of(Blind(wide, 0, n_kv_heads=None)) == 2 * (768**2 + 768)


def rank_of(rank: int | None, scale: float | None = None, n_kv_heads: int | None = None) -> Rank:
    return Rank(SHAPE, 0, rank=rank, scale=scale, n_kv_heads=n_kv_heads)


@pytest.mark.parametrize("pos", ["rope", "alibi", "learned"])
def test_queries_and_keys_of_full_width_are_multi_head_attention(pos: str) -> None:
    mha, rank, x = build("mha", pos), build("rank", pos), tokens(2, 16)
    pairs = zip(mha.named_parameters(), rank.named_parameters(), strict=True)
    assert all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)
    assert torch.equal(mha(x), rank(x))
    narrow = build("rank", pos, "attn.rank=4")
    assert not torch.allclose(mha(x), narrow(x), atol=1e-4)


def test_a_cache_of_narrow_keys_is_smaller() -> None:
    attention = rank_of(2, n_kv_heads=2)
    cache = attention.new_cache(16)
    attention(random(3, 5, 32), plain(5), cache)
    assert [buffer.shape for buffer in cache.buffers] == [(3, 2, 16, 2), (3, 2, 16, 8)]
    assert attention.cache_elements(5) == 5 * 2 * (2 + 8)


@torch.no_grad()
def test_a_head_scores_by_a_matrix_of_its_rank_and_merged_projections_by_any() -> None:
    x = torch.eye(32)[None]  # the scores of all pairs of channels: the matrix between them
    for attention, expected in (
        (rank_of(3), 3),
        (MHA(SHAPE, 0, qk_norm=False), 8),
        (Multiplicative(SHAPE, 0, n_kv_heads=None), 8),
        (Merged(SHAPE, 0), 32),
    ):
        attention.q.bias.zero_()  # type: ignore[union-attr]
        if not isinstance(attention, Merged):
            attention.k.bias.zero_()  # type: ignore[union-attr]
        q, k, _ = attention.project(x, plain(32))
        assert torch.linalg.matrix_rank((q @ k.mT).double(), rtol=1e-5).tolist() == [[expected] * 4]


@pytest.mark.parametrize("pos", ["none", "alibi"])
@torch.no_grad()
def test_merged_projections_compute_what_multi_head_attention_does(pos: str) -> None:
    """W_h = W_K^T W_Q and Z_h = W_O W_V of each head; the key's bias falls out of the softmax."""
    mha, merged = MHA(SHAPE, 0, qk_norm=False), Merged(SHAPE, 0)
    for number, parameter in enumerate(mha.parameters()):
        parameter.copy_(0.3 * random(*parameter.shape, seed=number))
    key, value = (part.weight.unflatten(0, (4, 8)) for part in (mha.k, mha.v))  # (H, Dh, D)
    merged.q.weight.copy_((key.mT @ mha.q.weight.unflatten(0, (4, 8))).flatten(0, 1))
    merged.q.bias.copy_((key.mT @ mha.q.bias.view(4, 8, 1)).flatten())
    Z = torch.einsum("ohd,hdi->ohi", mha.out.weight.unflatten(1, (4, 8)), value)
    merged.out.weight.copy_(Z.flatten(1))
    merged.out.bias.copy_(mha.out(mha.v.bias))
    x, positions = random(2, 12, 32), build("mha", pos).position.at(torch.arange(12))
    expected = mha(x, positions)
    torch.testing.assert_close(merged(x, positions), expected, rtol=1e-5, atol=1e-5)
    weights = mha.weights(x, positions)
    assert weights[:, :, -1].amax() > 0.5  # far from uniform
    torch.testing.assert_close(merged.weights(x, positions), weights, rtol=0, atol=1e-5)


def test_merged_projections_have_the_parameters_of_the_slide() -> None:
    """512 channels, 8 heads of 64: four times as many for either pair of matrices."""
    wide = Shape(dim=512, n_heads=8, n_layers=1, max_len=16, vocab_size=5)
    mha, merged = MHA(wide, 0, qk_norm=False), Merged(wide, 0)
    assert mha.q.weight.numel() + mha.k.weight.numel() == 524_288
    assert mha.v.weight.numel() + mha.out.weight.numel() == 524_288
    assert merged.q.weight.numel() == 2_097_152
    assert merged.out.weight.numel() == 2_097_152
    assert merged.cache_elements(1) == mha.cache_elements(1) / 2 == 512


def test_merged_projections_start_with_the_spread_of_the_product_that_they_replace() -> None:
    mha, merged = (
        build(attn, "none", "model.dim=128", "model.n_layers=2").attention_layers[0]
        for attn in ("mha", "merged")
    )
    W = mha.k.weight.unflatten(0, (4, 32)).mT @ mha.q.weight.unflatten(0, (4, 32))
    Z = torch.einsum(
        "ohd,hdi->ohi", mha.out.weight.unflatten(1, (4, 32)), mha.v.weight.unflatten(0, (4, 32))
    )
    for merged_weight, product in ((merged.q.weight, W), (merged.out.weight, Z)):
        ratio = merged_weight.std() / product.std()
        assert 0.95 < ratio.item() < 1.05


@pytest.mark.parametrize(("scale", "variance"), [(None, 1), (1.0, 16)])
@torch.no_grad()
def test_the_scale_keeps_the_variance_of_a_score_at_one(scale: float | None, variance: int) -> None:
    """Standard normal queries and keys of 16 channels; without the scale it is their width."""
    attention = rank_of(16, scale)
    attention.q = attention.k = attention.v = torch.nn.Identity()  # type: ignore[assignment]
    q, _, _ = attention.project(random(1, 4000, 64), plain(4000))
    _, k, _ = attention.project(random(1, 4000, 64, seed=1), plain(4000))
    pos = torch.arange(2)
    q, k = (x.reshape(-1, 1, 2, 16) for x in (q, k))
    weights = attention_weights(q, k, pos, pos, None)[:, 0, 1].double()  # query 1 on keys 0 and 1
    difference = (weights[:, 1] / weights[:, 0]).log()  # of two scores: twice the variance of one
    assert abs(difference.var().item() / (2 * variance) - 1) < 0.08


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attn.rank=0", "rank=0 must be at least 1, or null for head_dim=8"),
        ("attn.scale=0", "scale=0.0 must be above 0, or null for 1 / sqrt"),
        ("attn.scale=-2", "scale=-2.0 must be above 0"),
        ("attn.n_kv_heads=3", "n_kv_heads=3 must divide n_heads=4"),
    ],
)
def test_ranks_and_scales_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("rank", "none", override)


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights (H, T, T) of queries and keys (H, T, Dh) that all see each other."""
    now = torch.zeros(q.size(1))
    return attention_weights(q[None], k[None], now, now, None)[0]


def test_equal_projections_make_scores_symmetric_and_not_the_weights() -> None:
    """One channel, x = (1, 2), queries and keys equal: softmax divides each row by a sum of its own."""
    x = torch.tensor([[[1.0], [2.0]]])
    expected = torch.tensor([[[0.268941, 0.731059], [0.119203, 0.880797]]])
    torch.testing.assert_close(weights_of(x, x), expected, rtol=0, atol=1e-6)
    orthonormal, _ = torch.linalg.qr(random(6, 6))
    for same in (orthonormal[None], torch.zeros(1, 6, 6)):  # all rows of exp(scores) have one sum
        weights = weights_of(same, same)
        torch.testing.assert_close(weights, weights.mT)


def test_one_head_of_two_channels_is_not_two_heads_of_one() -> None:
    """x1 = (1, 0), x2 = (0, 1): head i reads channel i; one head reads both, with its scale or without."""
    x = torch.eye(2)  # (T, D)
    heads, wide = x.mT.unsqueeze(-1), x[None]
    two = weights_of(heads, heads)
    expected = torch.tensor(
        [[[0.731059, 0.268941], [0.5, 0.5]], [[0.5, 0.5], [0.268941, 0.731059]]]
    )
    torch.testing.assert_close(two, expected, rtol=0, atol=1e-6)
    values = x.mT.unsqueeze(-1)  # of each head: its channel
    output = (two @ values).squeeze(-1).mT
    torch.testing.assert_close(
        output, torch.tensor([[0.731059, 0.5], [0.5, 0.731059]]), rtol=0, atol=1e-6
    )
    for scale, row in ((1.0, [0.669762, 0.330238]), (2**0.5, [0.731059, 0.268941])):
        one = weights_of(scale * wide, wide)[0] @ x
        expected = torch.tensor([row, row[::-1]])
        torch.testing.assert_close(one, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(one, output, atol=0.1)
