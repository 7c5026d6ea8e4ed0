"""Recurrent networks: worked numbers, hand-written gradients, costs, and what they cannot be."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from tiny import build, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from compare.check.properties import PropertyViolated, TinyVariant, causality
from model.attention.cache import LayerCache
from model.attention.grouped import MHA
from model.attention.recurrent.elman import Elman
from model.attention.recurrent.lstm import LSTM
from model.attention.recurrent.network import Network
from model.ops.recurrence import elman, elman_reference, lstm, lstm_reference, slide
from model.position.base import Position, Positions
from model.shape import Shape
from train.setup.match import compose_matched

NETWORKS = ("elman", "lstm")


def shape(dim: int) -> Shape:
    return Shape(dim=dim, n_heads=1, n_layers=1, max_len=16, vocab_size=5, bias=True)


def no_positions(dim: int, length: int) -> Positions:
    return Position(shape(dim)).at(torch.arange(length))


def zeroed(network: Network) -> Network:
    """The network with all parameters 0."""
    for parameter in network.parameters():
        nn.init.zeros_(parameter)
    return network


def random(*sizes: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).requires_grad_()


# Worked numbers


@torch.no_grad()
def test_an_elman_network_by_hand_detects_that_both_events_have_happened() -> None:
    """Its state remembers each event; the read-out is slide(h_1 + h_2 - 1)."""
    network = zeroed(Elman(shape(2), 0, width=None, activation="slide"))
    network.input.weight.copy_(torch.eye(2))
    network.recurrent.weight.copy_(torch.eye(2))
    network.out.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    network.out.bias.copy_(torch.tensor([-1.0, 0.0]))
    x = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    detected = network(x, no_positions(2, 5))[0, :, 0].clamp(0, 1)
    assert detected.tolist() == [0, 0, 0, 1, 1]
    assert slide(torch.tensor([-1.0, 0.25, 2.0])).tolist() == [0, 0.25, 1]
    # whatever the order, and however often: 1 from the step on at which both have been seen
    for events in itertools.product([(0.0, 0.0), (1.0, 0.0), (0.0, 1.0)], repeat=4):
        x = torch.tensor([events])
        detected = network(x, no_positions(2, 4))[0, :, 0].clamp(0, 1)
        seen = [bool(x[0, : t + 1].amax(dim=0).min()) for t in range(4)]
        assert detected.tolist() == seen


@torch.no_grad()
def test_an_lstm_of_width_1_gives_the_gates_computed_by_hand() -> None:
    """All weights 0 but that of g, and no 1 in the forget gate: i, f and o are 1/2."""
    network = zeroed(LSTM(shape(1), 0, width=None))
    network.input.weight[2] = 1.0
    network.out.weight.fill_(1.0)
    network.input.bias[1] = -1.0  # takes the 1 away again
    cache = network.new_cache(2)
    h, c = [], []
    for x in (1.0, 0.0):
        h.append(network(torch.tensor([[[x]]]), no_positions(1, 1), cache).item())
        c.append(cache.state[1].item())
    assert c == pytest.approx([0.380797, 0.190399], abs=5e-7)
    assert h == pytest.approx([0.181700, 0.094065], abs=5e-7)


@torch.no_grad()
def test_a_forget_gate_without_input_keeps_what_one_plus_zero_says() -> None:
    network = zeroed(LSTM(shape(1), 0, width=None))
    cache = network.new_cache(1)
    cache.state = (torch.zeros(1, 1), torch.ones(1, 1))
    network(torch.zeros(1, 1, 1), no_positions(1, 1), cache)
    assert cache.state[1].item() == pytest.approx(1 / (1 + math.exp(-1)))


# Gradients


def hand_gradients(
    x: Tensor, w: Tensor, h0: Tensor, c0: Tensor, grad_h: Tensor, grad_c: Tensor
) -> tuple[Tensor, ...]:
    """Of an LSTM's x (B, T, 4 R), w, h0 and c0, gate by gate, as one writes them on paper."""
    hs, cs, gates = [h0], [c0], []
    for t in range(x.size(1)):
        i, f, g, o = (x[:, t] + hs[-1] @ w.T).chunk(4, dim=1)
        i, f, g, o = i.sigmoid(), (f + 1).sigmoid(), g.tanh(), o.sigmoid()
        cs.append(f * cs[-1] + i * g)
        hs.append(o * cs[-1].tanh())
        gates.append((i, f, g, o))
    grad_x, grad_w = torch.zeros_like(x), torch.zeros_like(w)
    dh, dc = torch.zeros_like(h0), grad_c
    of_gate = w.chunk(4)
    for t in reversed(range(x.size(1))):
        i, f, g, o = gates[t]
        dh = dh + grad_h[:, t]
        d_o = dh * cs[t + 1].tanh()
        dc = dc + dh * o * (1 - cs[t + 1].tanh() ** 2)
        d_f, d_i, d_g = dc * cs[t], dc * g, dc * i
        before = [d_i * i * (1 - i), d_f * f * (1 - f), d_g * (1 - g**2), d_o * o * (1 - o)]
        grad_x[:, t] = torch.cat(before, dim=1)
        for d, part in zip(before, grad_w.chunk(4), strict=True):
            part += d.T @ hs[t]
        dh = sum(d @ part for d, part in zip(before, of_gate, strict=True))
        dc = dc * f
    return grad_x, grad_w, dh, dc


def test_the_gradients_of_all_gates_are_those_written_by_hand_and_autograd_s() -> None:
    B, T, R = 3, 6, 4
    inputs = (random(B, T, 4 * R), random(4 * R, R, seed=1), *random(2, B, R, seed=2).unbind())
    grads = (random(B, T, R, seed=3).detach(), random(B, R, seed=4).detach())
    by_autograd = torch.autograd.grad(lstm_reference(*inputs), inputs, grads)
    by_hand = hand_gradients(*(x.detach() for x in inputs), *grads)
    fast = torch.autograd.grad(lstm(*inputs), inputs, grads)
    for ours, other, third in zip(fast, by_autograd, by_hand, strict=True):
        torch.testing.assert_close(ours, other)
        torch.testing.assert_close(ours, third)
    for ours, other in zip(lstm(*inputs), lstm_reference(*inputs), strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("activation", ["tanh", "slide"])
def test_the_gradients_of_an_elman_network_are_autograd_s(activation: str) -> None:
    inputs = (random(3, 6, 4), random(4, 4, seed=1), random(3, 4, seed=2))
    grad = random(3, 6, 4, seed=3).detach()
    expected = elman_reference(*inputs, activation)
    ours = elman(*inputs, activation)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, grad),
        torch.autograd.grad(expected, inputs, grad),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


# Start, options and costs


def test_the_matrix_of_the_state_starts_with_a_spectral_radius_near_1() -> None:
    for attn, blocks in (("elman", 1), ("lstm", 4)):
        weight = build(attn, "none", "model.dim=192").blocks[0].attention.recurrent.weight
        for block in weight.detach().chunk(blocks):
            assert torch.linalg.eigvals(block).abs().max() == pytest.approx(1, abs=0.15)
    input_weight = build("lstm", "none", "model.dim=192").blocks[0].attention.input.weight
    assert input_weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("attn", NETWORKS)
@pytest.mark.parametrize("pos", ["rope", "rope_yarn", "alibi", "t5"])
def test_positions_that_act_on_pairs_are_refused_by_name(attn: str, pos: str) -> None:
    with pytest.raises(ValueError, match=rf"(?i)which {attn} has no use for") as refusal:
        build(attn, pos)
    assert "\n" not in str(refusal.value)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"width=0 must be at least 1, or null for dim=32"):
        build("lstm", "none", "attn.width=0")
    with pytest.raises(ValueError, match=r"width=-1 must be at least 1"):
        build("elman", "none", "attn.width=-1")
    with pytest.raises(ValueError, match="activation=relu must be tanh or slide"):
        build("elman", "none", "attn.activation=relu")


def weights_of(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters() if p.dim() > 1)


def test_weights_are_counted_and_a_width_equals_multi_head_attention() -> None:
    for D, R in ((192, 100), (768, 768)):
        of_elman = Elman(shape(D), 0, width=R, activation="tanh")
        of_lstm = LSTM(shape(D), 0, width=R)
        assert weights_of(of_elman) == 2 * D * R + R**2
        assert weights_of(of_lstm) == 4 * D * R + 4 * R**2 + D * R
        assert of_lstm.decode_flops(7) == 2 * weights_of(of_lstm)
        assert of_elman.decode_flops(7) == 2 * weights_of(of_elman)
    ratios = {"elman": math.sqrt(5) - 1, "lstm": (math.sqrt(89) - 5) / 8}  # of 4 D^2
    assert ratios == pytest.approx({"elman": 1.236, "lstm": 0.554}, abs=5e-4)
    assert {name: round(192 * ratio) for name, ratio in ratios.items()} == {
        "elman": 237,
        "lstm": 106,
    }
    for network in (
        Elman(shape(192), 0, width=237, activation="tanh"),
        LSTM(shape(192), 0, width=106),
    ):
        assert weights_of(network) == pytest.approx(4 * 192**2, rel=0.006)


def test_an_lstm_as_wide_as_gpt2_costs_more_than_attention_until_1919_tokens_are_cached() -> None:
    network = LSTM(shape(768), 0, width=None)
    attention = MHA(shape(768), 0, qk_norm=False)
    assert network.decode_flops(1) / 2 == 5_308_416
    assert attention.decode_flops(1_918) < network.decode_flops(1_918)
    assert attention.decode_flops(1_919) == network.decode_flops(1_919)
    assert network.cache_elements(10_000) == 1_536
    assert attention.cache_elements(1) == 1_536


@pytest.mark.parametrize("attn", NETWORKS)
def test_the_cache_is_constant_and_ends_at_its_capacity(attn: str) -> None:
    model = build(attn, "none", "attn.width=20")
    cache = model.new_cache(500)
    sizes = set()
    for part in tokens(1, 500).split([1, 1, 98, 400], dim=1):
        model(part, cache)
        sizes.add(cache.nbytes)
    assert sizes == {3 * 4 * 20 * (2 if attn == "lstm" else 1)}
    assert len(cache) == 500
    with pytest.raises(ValueError, match="the cache holds 500 tokens, not 501"):
        model(tokens(1, 1), cache)


@pytest.mark.parametrize("attn", NETWORKS)
def test_parameters_can_be_matched_to_attention(attn: str) -> None:
    baseline = "baseline='attn=mha pos=learned'"
    config = compose_matched([f"attn={attn}", "pos=learned", "match=params", baseline])
    assert abs(config["matched"]["leftover"]) < 0.005
    wider = config["model"]["ff_dim"] > 4 * config["model"]["dim"]
    assert wider == (attn == "elman")  # as wide as the model, it has 3 D^2 weights, an LSTM 9


# A negative control: the bidirectional network (CMU 10-423, homework 1)


ONE_WAY = Elman.forward


def both_ways(
    self: Elman, x: Tensor, positions: Positions, cache: LayerCache | None = None
) -> Tensor:
    """An Elman network read in both directions, its outputs added."""
    return ONE_WAY(self, x, positions) + ONE_WAY(self, x.flip(1), positions).flip(1)


def test_causality_calls_a_bidirectional_network_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    causality(TinyVariant("elman", "learned"))
    monkeypatch.setattr(Elman, "forward", both_ways)
    with pytest.raises(PropertyViolated, match="token 1 changes earlier logits"):
        causality(TinyVariant("elman", "learned"))


def test_only_on_prefixes_does_a_bidirectional_network_give_a_distribution() -> None:
    """p(x_t | network(x_1 .. x_{t-1})) over all texts of 3 letters sums to 1.

    Outputs at t - 1 of a network that has read the whole text, x_t included, do not.
    """
    torch.manual_seed(2)
    letters, length, dim = 3, 3, 8
    network = Elman(shape(dim), 0, width=None, activation="tanh").double()
    embed, head = nn.Embedding(letters + 1, dim).double(), nn.Linear(dim, letters).double()

    for parameter in network.parameters():
        nn.init.normal_(parameter)  # outputs depend on the letters on both sides

    def log_p(text: Tensor) -> Tensor:
        """Log-probabilities of the letter after each one of the text: (T, letters)."""
        y = both_ways(network, embed(text)[None], no_positions(dim, len(text)))
        return F.log_softmax(head(y), dim=-1)[0]

    def of_prefixes(text: Tensor) -> Tensor:
        start = torch.tensor([letters])  # a token before the first letter
        steps = [log_p(torch.cat((start, text[:t])))[-1, text[t]] for t in range(length)]
        return torch.stack(steps).sum()

    def of_the_whole(text: Tensor) -> Tensor:
        read = torch.cat((torch.tensor([letters]), text))
        return log_p(read)[:-1].gather(1, text[:, None]).sum()

    def total(log_probability: Callable[[Tensor], Tensor]) -> float:
        texts = itertools.product(range(letters), repeat=length)
        return sum(log_probability(torch.tensor(text)).exp().item() for text in texts)

    assert total(of_prefixes) == pytest.approx(1, abs=1e-12)
    assert abs(total(of_the_whole) - 1) > 0.1
