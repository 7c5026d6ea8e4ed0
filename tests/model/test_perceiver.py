"""Models whose inner blocks run on latents: what they see, what they cost, and their blind spot."""

import pytest
import torch
from tiny import build, tokens
from torch.utils.flop_counter import FlopCounterMode

from compare.check.properties import VOCAB
from compare.evaluate.answers import greedy
from model import perceiver
from model.cost import count_parameters, flops_per_token, scores_of_row
from model.generate import Sampler, generate
from model.loss import next_token_loss, token_nll
from train.config.compose import compose
from train.setup.build import build_model

GREEDY = Sampler(temperature=0)
N = 16  # max_len of the tiny models
GROUPED, SCHEMES = ("mha", "gqa", "mqa"), ("learned", "rope", "alibi", "t5", "none", "pattern")


def logits_and_reach(model, x):
    """Logits (T, V), and which input tokens each one depends on, by gradient: (T, T)."""
    embedded = model.embed(x).detach().requires_grad_()
    handle = model.embed.register_forward_hook(lambda *_: embedded)
    y = model(x)[0]
    handle.remove()
    rows = [torch.autograd.grad(row.sum(), embedded, retain_graph=True)[0] for row in y]
    return y, torch.stack([row[0].abs().sum(-1) > 0 for row in rows])


@pytest.mark.parametrize("pos", SCHEMES)
@pytest.mark.parametrize("attn", GROUPED)
def test_as_many_latents_as_tokens_are_the_ordinary_model(attn, pos):
    x = tokens(2, N)
    assert torch.equal(build(attn, pos, f"model.latents={N}")(x), build(attn, pos)(x))


@pytest.mark.parametrize("pos", SCHEMES)
@pytest.mark.parametrize("attn", GROUPED)
def test_the_last_positions_see_the_whole_past_and_nothing_later(attn, pos):
    m, model = 5, build(attn, pos, "model.latents=5")
    y, reach = logits_and_reach(model, tokens(1, N))
    assert y.shape == (m, VOCAB)
    assert torch.equal(reach, torch.ones(N, N).tril()[-m:].bool())


def test_one_layer_of_latents_is_the_end_of_the_ordinary_model():
    for pos in SCHEMES[:-1]:
        x, whole = tokens(2, N), build("gqa", pos, "model.n_layers=1")
        cut = build("gqa", pos, "model.n_layers=1", "model.latents=3")
        torch.testing.assert_close(cut(x), whole(x)[:, -3:])


def test_the_loss_is_that_of_the_last_targets():
    model, x = build("gqa", "rope", "model.latents=5"), tokens(3, N + 1)
    logits = model(x[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, -5:].flatten())
    torch.testing.assert_close(next_token_loss(model, x[:, :-1], x[:, 1:]), expected)


@pytest.mark.parametrize("kind", ["model.latents=5", "model.bottleneck=5 model.n_layers=2"])
def test_crossing_blocks_are_computed_again_too(kind, monkeypatch):
    """With the same gradients, bit for bit, and every block twice."""
    found, ran = {}, []
    real = perceiver.cross
    monkeypatch.setattr(perceiver, "cross", lambda *parts: ran.append(1) or real(*parts))
    for memory in ("full", "lean"):
        ran.clear()
        model = build("gqa", "rope", *kind.split(), f"memory={memory}").train()
        x = tokens(3, N + 1)
        next_token_loss(model, x[:, :-1], x[:, 1:]).backward()
        found[memory] = len(ran), [p.grad for p in model.parameters()]
    assert found["lean"][0] == 2 * found["full"][0]
    assert all(map(torch.equal, found["full"][1], found["lean"][1]))


def test_chunks_of_the_loss_have_the_last_targets_too(monkeypatch):
    model, x = build("gqa", "rope", "model.latents=5"), tokens(3, N + 1)
    whole = next_token_loss(model, x[:, :-1], x[:, 1:])
    monkeypatch.setattr("model.loss.LOGITS", 4 * VOCAB)
    torch.testing.assert_close(next_token_loss(model, x[:, :-1], x[:, 1:]), whole)


@pytest.mark.parametrize("length", [3, 5, 12, 16, 17, 23, 50])
@pytest.mark.parametrize("stride", [3, 16])
def test_every_token_of_a_text_is_scored_with_at_least_the_context_but_m(length, stride):
    m, model, text = 5, build("gqa", "rope", "model.latents=5"), tokens(length)
    nats = token_nll(model, text, context=N, stride=stride, predicted=m, batch_size=2, device="cpu")
    assert nats.shape == (length - 1,)
    for place in range(length - 1):
        # Token place + 1 is one of the last m of some window, with N - m tokens before it or all.
        ends = range(place, min(place + m, length - 1))
        latest = max(0, place - (N - m))
        contexts = [(s, e) for e in ends for s in range(max(0, e + 1 - N), latest + 1)]
        found = [
            -model(text[None, start : end + 1])[0, place - end - 1].log_softmax(-1)[text[place + 1]]
            for start, end in contexts
        ]
        assert min(abs(nats[place] - x) for x in found) < 1e-5, place


def test_validation_of_latents_equals_that_of_the_ordinary_model_where_m_is_the_context():
    text = tokens(45)
    options = {"context": N, "stride": N, "batch_size": 2, "device": "cpu"}
    latents = token_nll(build("mha", "rope", f"model.latents={N}"), text, predicted=N, **options)
    assert torch.equal(latents, token_nll(build("mha", "rope"), text, **options))


@pytest.mark.parametrize("pos", SCHEMES)
@pytest.mark.parametrize("attn", GROUPED)
def test_no_token_beyond_the_bottleneck_reaches_another(attn, pos):
    """The course's Perceiver is causal, and blind from token m on: those tokens enter no latent."""
    m, model = 5, build(attn, pos, "model.bottleneck=5")
    _, reach = logits_and_reach(model, tokens(1, N))
    seen = torch.ones(N, N).tril()
    seen[:, m:] = torch.eye(N)[:, m:]  # each sees itself alone of them
    assert torch.equal(reach, seen.bool())


def test_logits_beyond_the_bottleneck_do_not_change_with_the_tokens_there():
    x, m = tokens(1, N), 5
    other = x.clone()
    other[:, m : N - 1] = (x[:, m : N - 1] + 1) % VOCAB
    model = build("mha", "learned", "model.bottleneck=5")
    torch.testing.assert_close(model(x)[:, -1], model(other)[:, -1], rtol=0, atol=0)
    ordinary = build("mha", "learned")
    assert (ordinary(x)[:, -1] - ordinary(other)[:, -1]).abs().max() > 1e-3


def of_the_course(*overrides):
    config = compose(["model=cs224n", "pos=learned", *overrides])
    with torch.device("meta"):
        return build_model(config, 256)


def test_parameters_and_products_of_the_course():
    assert count_parameters(of_the_course("model.bottleneck=64"))[0] == 3_339_776
    assert count_parameters(of_the_course("model.bottleneck=32"))[0] == 3_331_584
    assert count_parameters(of_the_course())[0] == 3_323_392
    n, m, d = 128, 64, 256

    def scores(model):
        layers = enumerate(model.attention_layers)
        return sum(scores_of_row(a, *model.rows(i, n), causal=False) for i, a in layers) / 2

    def projections(model):
        flops = flops_per_token(model, n, causal=False) * n / 6
        return flops - scores(model) - n * 256 * d  # the head

    # The course computes scores of the m latents with all tokens: 12,582,912 in all. The mask leaves
    # those with the first m, which is what we compute; and it has keys of all tokens.
    assert 2 * n * m * d + 2 * n * m * d + 2 * (2 * m * m * d) == 12_582_912
    assert scores(of_the_course("model.bottleneck=64")) == 12_582_912 - 2 * (n - m) * m * d
    assert scores(of_the_course()) == 33_554_432
    assert d * d * (36 * m + 12 * n) == 251_658_240
    assert projections(of_the_course("model.bottleneck=64")) == 251_658_240 - 2 * (n - m) * d * d
    assert projections(of_the_course()) == 402_653_184


@pytest.mark.parametrize("overrides", [["model.latents=5"], ["model.bottleneck=5"], []])
@pytest.mark.parametrize("attn", GROUPED)
def test_flops_are_those_that_torch_counts(attn, overrides):
    model = build(attn, "rope", "kernel=matmul", *overrides)
    with FlopCounterMode(display=False) as counter, torch.enable_grad():
        next_token_loss(model, tokens(2, N), tokens(2, N)).backward()
    stated = 2 * N * flops_per_token(model, N, causal=False)
    assert counter.get_total_flops() == stated


@pytest.mark.parametrize("overrides", [["model.latents=5"], ["model.bottleneck=5"]])
def test_checkpointing_changes_no_gradient(overrides):
    x, grads = tokens(2, N + 1), []
    for memory in ("full", "lean"):
        model = build("gqa", "rope", f"memory={memory}", *overrides).train()
        next_token_loss(model, x[:, :-1], x[:, 1:]).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("attn", "overrides", "words"),
    [
        (
            "mha",
            ["model.latents=0"],
            "latents=0 must be at least 1 and at most max_len=16, or null",
        ),
        ("mha", ["model.bottleneck=17"], "bottleneck=17 must be at least 1 and at most max_len=16"),
        ("mha", ["model.latents=4", "model.bottleneck=4"], "one of them must be null"),
        ("mha", ["model.n_layers=1", "model.bottleneck=4"], "needs n_layers of at least 2, not 1"),
        (
            "sliding",
            ["model.latents=4"],
            "first layer, not SlidingWindow; mha, gqa, mqa, key_shift and short_conv work",
        ),
        (
            "exclusive",
            ["model.bottleneck=4"],
            "not ExclusiveAttention; mha, gqa, mqa, key_shift and short_conv work",
        ),
        (
            "forgetting",
            ["model.latents=4"],
            "not ForgettingAttention; mha, gqa, mqa, key_shift and short_conv work",
        ),
        (
            "multiplicative",
            ["model.latents=4"],
            "not Multiplicative.*; mha, gqa, mqa, key_shift and short_conv work",
        ),
        (
            "value_residual",
            ["model.bottleneck=4"],
            "not ValueResidual.*; mha, gqa, mqa, key_shift and short_conv work",
        ),
        ("lstm", ["model.bottleneck=4"], "not LSTM; mha, gqa, mqa, key_shift and short_conv work"),
    ],
)
def test_what_cannot_be_is_refused_by_name(attn, overrides, words):
    with pytest.raises(ValueError, match=words):
        build(attn, "none", *overrides)


@torch.no_grad()
@pytest.mark.parametrize("overrides", ["model.latents=5", "model.bottleneck=5"])
def test_generation_reads_the_whole_text_for_each_token(overrides):
    model, text = build("gqa", "rope", overrides), tokens(1, 4)
    said = [t for (t,) in generate(model, text[0].tolist(), 12, sampler=GREEDY, seed=0)]
    answer, _ = greedy(model, text, -1, 12)
    for expected in said:
        assert int(model(text)[0, -1].argmax()) == expected
        text = torch.cat((text, torch.tensor([[expected]])), dim=1)
    assert answer[0] == said


def test_there_is_no_cache():
    with pytest.raises(ValueError, match="no KV cache"):
        build("mha", "rope", "model.latents=4").new_cache(8)
