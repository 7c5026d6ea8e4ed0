"""The whole model: sizes, start, scoring, generating."""

import math
from typing import Any

import pytest
import torch
from tiny import VOCAB, build, tokens
from torch.nn import functional as F

from model.cost import count_parameters
from model.generate import Sampler, generate
from model.loss import bits_per_byte, perplexity, token_nll
from model.ops.norm import RMSNorm
from model.shape import Shape
from model.transformer import Transformer
from train.config.compose import choices_of, compose
from train.setup.build import build_model, init_model


def count(*overrides: str, vocab_size: int = 65) -> tuple[int, int]:
    with torch.device("meta"):
        return count_parameters(build_model(compose(list(overrides)), vocab_size))


@pytest.mark.parametrize(
    ("overrides", "params"),
    [
        ("attn=mha pos=learned", 2_697_600),
        ("attn=gqa attn.n_kv_heads=3 pos=learned", 2_475_264),
        ("attn=gqa attn.n_kv_heads=2 pos=learned", 2_401_152),
        ("attn=mqa pos=learned", 2_327_040),
        ("attn=mha pos=rope", 2_694_528),
    ],
)
def test_the_coursework_model_has_its_published_size(overrides: str, params: int) -> None:
    assert count("model=coursework", *overrides.split())[0] == params


def test_gpt2_has_its_published_size() -> None:
    total, inner = count("model=gpt2", "attn=mha", "pos=learned", vocab_size=50257)
    assert total == 124_439_808
    assert inner == total - 50257 * 768 - 1024 * 768


def test_the_baby_gpt_has_its_published_size() -> None:
    total, _ = count("model=shakespeare", "attn=mha", "pos=learned")
    assert total - 256 * 384 == 10_646_784  # nanoGPT leaves the positions out: 10.65M


def test_the_start_has_the_documented_spread() -> None:
    config = compose(["model=coursework", "attn=mha", "pos=learned"])
    model = build_model(config, 65)
    init_model(model, config, 0)
    spread = {n: p.std().item() for n, p in model.named_parameters() if p.dim() == 2}
    assert spread["embed.weight"] == pytest.approx(0.02, rel=0.05)
    assert spread["blocks.0.attention.out.weight"] == pytest.approx(0.02, rel=0.05)
    small = 0.02 / math.sqrt(12)
    assert spread["blocks.0.feedforward.out.weight"] == pytest.approx(small, rel=0.05)
    assert all((p == 0).all() for n, p in model.named_parameters() if n.endswith("bias"))
    assert (model.norm.weight == 1).all()


@pytest.mark.parametrize("feedforward", ["gelu", "gelu_tanh", "relu2", "swiglu"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("bias", ["true", "false"])
def test_feedforwards_and_norms_are_choices_of_every_model(
    feedforward: str, norm: str, bias: str
) -> None:
    choices = [f"model.feedforward={feedforward}", f"model.norm={norm}", f"model.bias={bias}"]
    model = build("gqa", "rope", *choices, "model.ff_dim=48")
    assert model(tokens(2, 16)).isfinite().all()
    named = [n for n, _ in model.named_parameters() if n.endswith("bias")]
    assert bool(named) == (bias == "true")
    assert model.blocks[0].feedforward.up.out_features == 48


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rmsnorm_and_its_gradients_are_those_of_torch(dtype: torch.dtype, tolerance: float) -> None:
    norm = RMSNorm(24, bias=False)
    x, grad = torch.randn(2, 3, 5, 24), torch.randn(2, 3, 5, 24)
    x[0] *= 1e-3  # so that eps counts
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2)
    given = x.to(dtype).transpose(1, 2).requires_grad_()
    exact = given.detach().float().requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    y, expected = norm(given), F.rms_norm(exact, (24,), weight, eps=1e-5)
    y.backward(grad.transpose(1, 2).to(dtype))
    expected.backward(grad.transpose(1, 2))
    pairs = ((y, expected), (given.grad, exact.grad), (norm.weight.grad, weight.grad))
    for actual, wanted in pairs:
        assert (actual - wanted).norm() < tolerance * wanted.norm()
    assert y.dtype == given.grad.dtype == dtype


def test_a_tied_head_is_the_token_table() -> None:
    tied = build("mha", "none", "model.tie_embeddings=true")
    free = build("mha", "none", "model.tie_embeddings=false")
    assert tied.head.weight is tied.embed.weight
    assert count_parameters(free)[0] - count_parameters(tied)[0] == VOCAB * 32
    assert count_parameters(free)[1] - count_parameters(tied)[1] == VOCAB * 32


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"dim": 30}, r"dim=30 must be a multiple of n_heads=4; n_heads that work: 1, 2, 3, 5"),
        ({"n_layers": 0}, "n_layers=0 must be at least 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"ff_dim": 0}, "ff_dim=0"),
    ],
)
def test_impossible_shapes_are_refused(wrong: dict[str, int], message: str) -> None:
    right = {"dim": 32, "n_heads": 4, "n_layers": 2, "max_len": 16, "vocab_size": 5}
    with pytest.raises(ValueError, match=message):
        Shape(**right | wrong)


def test_a_score_is_the_sum_over_every_token_but_the_first() -> None:
    model, text = build("mha", "rope"), tokens(100)
    nats = token_nll(model, text, context=16, stride=16, batch_size=4, device="cpu")
    total, scored = nats.sum().item(), len(nats)
    expected = 0.0
    for start in range(0, 99, 16):
        window = text[start : start + 17]
        logits = model(window[None, :-1])[0].log_softmax(dim=-1)
        expected -= logits.gather(1, window[1:, None]).sum().item()
    assert scored == 99
    assert total == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("length", [2, 16, 17, 18, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_does_not_depend_on_the_batch_size(length: int, dtype: str) -> None:
    model, text = build("gqa", "learned"), tokens(length)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        scores = [
            token_nll(model, text, context=16, stride=16, batch_size=size, device="cpu")
            for size in (1, 3, 64)
        ]
    assert {len(nats) for nats in scores} == {length - 1}
    for nats in scores[1:]:
        assert nats.sum().item() == pytest.approx(scores[0].sum().item(), rel=1e-5)


def test_a_text_of_one_token_cannot_be_scored() -> None:
    with pytest.raises(ValueError, match="a text of 1 tokens"):
        token_nll(
            build("mha", "none"), tokens(1), context=16, stride=16, batch_size=1, device="cpu"
        )


def test_the_units_of_a_score() -> None:
    assert perplexity(math.log(8)) == pytest.approx(8)
    assert perplexity(1e4) == math.inf
    assert bits_per_byte(80 * math.log(2), text_bytes=40) == pytest.approx(2)


def lively(attn: str, pos: str) -> Transformer:
    """A model with parameters so wide that its likeliest token depends on the whole text."""
    model, generator = (
        build(attn, pos, "model.tie_embeddings=false"),
        torch.Generator().manual_seed(0),
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.7, generator)
    return model


def written(model: Transformer, prompt: list[int], n: int, **options: Any) -> list[list[int]]:
    """The texts that `generate` gives, a list of tokens for each."""
    sampler = Sampler(**{k: options.pop(k) for k in tuple(options) if k in Sampler.__annotations__})
    columns = generate(model, prompt, n, sampler=sampler, **{"seed": 0, **options})
    return [[t for t in row if t is not None] for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("pos", choices_of("pos"))
@pytest.mark.parametrize("attn", ["gqa", "mla", "pattern"])
def test_greedy_text_with_a_cache_is_that_without(attn: str, pos: str) -> None:
    model, prompt = lively(attn, pos), [1, 2, 3]
    with_cache = written(model, prompt, 40, temperature=0, num_samples=2)  # slides twice
    assert with_cache == written(model, prompt, 40, temperature=0, num_samples=2, use_cache=False)
    text = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert with_cache[0][:12] == text[3:]
    assert len(with_cache[1]) == 40
    assert len(set(with_cache[0])) > 1


def test_a_prompt_longer_than_the_context_counts_by_its_end() -> None:
    model, prompt = lively("mha", "learned"), list(range(10)) * 3
    drawn = written(model, prompt, 50, temperature=0)
    assert drawn == written(model, prompt[-16:], 50, temperature=0)
    assert len(drawn[0]) == 50
    wide = lively("mha", "rope")
    assert written(wide, prompt, 20, temperature=0, context_length=64) != written(
        wide, prompt, 20, temperature=0
    )
    with pytest.raises(ValueError, match="context=17"):
        written(model, prompt, 1, context_length=17)


def test_a_text_ends_with_its_last_token_and_the_others_go_on() -> None:
    model = build("mha", "rope")
    free = written(model, [1], 14, temperature=5.0, num_samples=3)
    end = free[0][4]
    stopped = written(model, [1], 14, temperature=5.0, num_samples=3, eos_id=end)
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(end) + 1] if end in whole else whole)
    assert len({len(row) for row in stopped}) > 1


def test_drawing_follows_its_seed_and_each_text_has_its_own() -> None:
    model = build("mha", "rope")
    draws = [written(model, [1], 14, temperature=5.0, num_samples=n, seed=0) for n in (1, 3)]
    assert draws[0] == draws[1][:1]
    assert len({tuple(row) for row in draws[1]}) == 3
    assert written(model, [1], 14, temperature=5.0, seed=1) != draws[0]
    assert written(model, [1], 14, temperature=5.0, top_k=1) == written(
        model, [1], 14, temperature=0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
    ],
)
def test_impossible_draws_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampler(**options)
    with pytest.raises(ValueError, match="prompt is empty"):
        written(build("mha", "rope"), [], 1)


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.4},
                                     {"repetition_penalty": 1.7, "top_p": 0.9, "temperature": 0.6}])  # fmt: skip
def test_draws_keep_what_those_of_transformers_keep(options: dict[str, Any]) -> None:
    theirs = pytest.importorskip(
        "transformers", reason="the optional group peers is not installed"
    ).generation.logits_process
    sampler, text = Sampler(**options), tokens(3, 6)
    logits = torch.randn(3, 17, generator=torch.Generator().manual_seed(0)) * 3
    expected = theirs.RepetitionPenaltyLogitsProcessor(sampler.repetition_penalty)(text, logits)
    expected = theirs.TemperatureLogitsWarper(sampler.temperature)(text, expected)
    if sampler.top_k:
        expected = theirs.TopKLogitsWarper(sampler.top_k)(text, expected)
    if sampler.top_p:
        expected = theirs.TopPLogitsWarper(sampler.top_p)(text, expected)
    found = sampler.filter_top_k_top_p(
        sampler.apply_repetition_penalty(logits, text) / sampler.temperature
    )
    assert found.isinf().any()
    torch.testing.assert_close(found, expected)
