"""Finetuning a part: counts, what stays frozen, where it starts, and what can be merged."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from tiny import RUN, build, tokens
from torch import Tensor

from cli.evaluate import evaluate
from compare.cost.counts import weights_outside_attention
from compare.evaluate.load import LoadedRun
from compare.evaluate.perplexity import store_weights
from model.cost import flops_per_token
from model.loss import next_token_loss
from model.transformer import Transformer
from model.tuning.lora import DynamicLoRALinear, LoRALinear
from train.config.compose import compose
from train.config.schema import Config
from train.record.checkpoint import find
from train.run import run_training
from train.setup.build import build_model, build_optimizer, build_tuning, init_model

KINDS = ("lora", "dylora", "adapter", "prefix", "prompt", "ptuning")
SAME_START = ("lora", "dylora", "adapter")  # the model starts as its parent


def tuned(kind: str, *overrides: str, pos: str = "rope") -> Transformer:
    return build("gqa", pos, f"tune={kind}", *overrides)


@torch.no_grad()
def draw_added(model: Transformer, std: float) -> None:
    """Draw what finetuning has added, so that it changes what the model computes."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name in model.added:
            parameter.normal_(0, std)


@torch.no_grad()
def check_decoding(model: Transformer, text: Tensor) -> None:
    """Assert that parts of a text (2, 12), read with the cache, give what the whole does."""
    whole, cache = model(text), model.new_cache(12)
    parts = [model(part, cache) for part in text.split([5, 1, 1, 3, 2], dim=1)]
    assert len(cache) == 12
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def counted(*overrides: str) -> int:
    """Trained parameters."""
    config = compose([*overrides, "model.vocab_size=2048"])
    with torch.device("meta"):
        model = build_model(config, 2048)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ("tune=lora tune.rank=8 tune.modules=null", 82_944),  # 6.25 % of 1,327,104
        ("tune=lora tune.rank=8 tune.modules=[q,v]", 18_432),
        ("tune=lora tune.rank=4 tune.modules=null model.n_layers=1", 13_824),
        (
            "tune=lora tune.rank=8 tune.modules=null model.n_layers=1 model.dim=768 model.n_heads=12",
            110_592,
        ),
        ("tune=adapter tune.width=16 tune.norms=false", 38_112),
        ("tune=prefix tune.tokens=16", 18_432),
        ("tune=prompt tune.tokens=16", 3_072),
        ("tune=ptuning tune.tokens=16 tune.width=64", 3_072 + 2 * 192 * 64 + 64 + 192),
    ],
)
def test_the_trained_parameters_are_those_of_the_formulas(overrides: str, expected: int) -> None:
    assert counted("pos=rope", *overrides.split()) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_added_parameters_have_gradients(kind: str) -> None:
    model = tuned(kind).train()
    text = tokens(2, 13)
    next_token_loss(model, text[:, :-1], text[:, 1:]).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == trained
    norms = {name for name in trained if "norm" in name}
    assert trained - norms == set(model.added)
    assert bool(norms) == (kind == "adapter")
    assert model.added


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_method_promises_it_the_model_starts_as_its_parent(kind: str) -> None:
    parent, model, text = build("gqa", "rope"), tuned(kind), tokens(2, 12)
    assert torch.equal(parent(text), model(text)) == (kind in SAME_START)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pos", ["rope", "alibi"])
def test_decoding_with_the_cache_equals_reading_the_whole(kind: str, pos: str) -> None:
    model = tuned(kind, pos=pos)
    draw_added(model, 0.3)
    check_decoding(model, tokens(2, 12))


def test_of_two_narrow_matrices_the_zero_one_learns_first() -> None:
    """Both zero would never move."""
    model = tuned("lora").train()
    text = tokens(2, 13)
    next_token_loss(model, text[:, :-1], text[:, 1:]).backward()
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    assert layers
    for layer in layers:
        assert not layer.lora_b.weight.any()
        assert not layer.lora_a.weight.grad.any()
        assert layer.lora_b.weight.grad.any()


def test_merged_weights_compute_the_same() -> None:
    overrides = ("tune.modules=null", "model.bias=true")
    model, text = tuned("lora", *overrides), tokens(2, 12)
    plain = build("gqa", "rope", "model.bias=true")
    draw_added(model, 0.1)
    with torch.no_grad():
        config: Config = {"tune": compose(["tune=lora"])["tune"]}
        merged = build_tuning(config).merged(model)
        plain.load_state_dict(merged, strict=False)
    assert merged.keys() == dict(plain.named_parameters()).keys()
    torch.testing.assert_close(plain(text), model(text), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(plain(text), build("gqa", "rope", "model.bias=true")(text))


@pytest.mark.parametrize(
    ("attn", "pos"),
    [("mla", "rope"), ("multiplicative", "rope"), ("concatenated", "none"), ("elman", "none"),
     ("lstm", "none")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_layers_whose_weight_is_used_by_itself_are_adapted_too(
    kind: str, attn: str, pos: str
) -> None:
    overrides = (f"tune={kind}", "tune.modules=null", "tune.rank=2")
    model, text = build(attn, pos, *overrides), tokens(2, 12)
    draw_added(model, 0.1)
    check_decoding(model, text)
    with torch.no_grad():
        plain = build(attn, pos)
        config: Config = {"tune": compose(list(overrides))["tune"]}
        plain.load_state_dict(build_tuning(config).merged(model), strict=False)
        torch.testing.assert_close(plain(text), model(text), rtol=1e-4, atol=1e-5)
    model(text).square().sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n in model.added)


def test_models_with_latents_take_adapters_and_no_prefix() -> None:
    assert tuned("adapter", "model.bottleneck=4", "model.n_layers=3").added
    for latents in ("model.latents=4", "model.bottleneck=4"):
        with pytest.raises(ValueError, match="latents and bottlenecks cross to it"):
            tuned("prefix", latents, "model.n_layers=3")


def test_what_makes_a_prompt_costs_a_text_nothing() -> None:
    """As the prompt itself, which is not counted."""
    one, made = (tuned(kind, "tune.tokens=3") for kind in ("prompt", "ptuning"))
    assert flops_per_token(made, 16) == flops_per_token(one, 16)
    assert weights_outside_attention(made) == weights_outside_attention(one)


def test_four_bits_are_for_frozen_weights() -> None:
    model = tuned("lora")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    store_weights(cast(LoadedRun, SimpleNamespace(model=model)))
    for name, parameter in model.named_parameters():
        matrix = name.startswith("blocks.") and name.endswith("weight") and "norm" not in name
        changed = not torch.equal(before[name], parameter)
        assert changed == (matrix and name not in model.added), name


def test_a_part_of_the_channels_is_a_layer_of_lower_rank() -> None:
    """Trained with random parts of them, dylora computes at each rank what lora of that rank does."""
    model, text = tuned("dylora", "tune.rank=4", "tune.alpha=8"), tokens(2, 12)
    lower = tuned("lora", "tune.rank=2", "tune.alpha=4")  # alpha / rank is that of all channels
    draw_added(model, 0.1)
    with torch.no_grad():
        for wide, narrow in zip(model.modules(), lower.modules(), strict=True):
            if isinstance(wide, DynamicLoRALinear):
                assert isinstance(narrow, LoRALinear)
                narrow.lora_a.weight.copy_(wide.lora_a.weight[:2])
                narrow.lora_b.weight.copy_(wide.lora_b.weight[:, :2])
                wide.rank = 2
                torch.testing.assert_close(wide.merged(), narrow.merged())
        torch.testing.assert_close(model(text), lower(text))
        model.train()
        assert len({model(text).sum().item() for _ in range(12)}) > 1


def test_the_second_matrix_may_learn_faster() -> None:
    """LoRA+: the first step of AdamW moves each weight by its learning rate."""
    config = compose([*RUN, "tune=lora", "tune.ratio=16", "optim.weight_decay=0", "pos=rope"])
    model = build_model(config, 17)
    init_model(model, config, 0)
    optimizer, _ = build_optimizer(config, model, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step(1e-3)
    for name, parameter in model.named_parameters():
        moved = (before[name] - parameter).abs().max().item()
        rate = {"lora_a": 1e-3, "lora_b": 16e-3}.get(name.split(".")[-2], 0.0)
        assert moved == pytest.approx(rate, rel=1e-3), name
    with pytest.raises(ValueError, match="muon has one learning rate for all"):
        build_optimizer(config | {"optim": compose(["optim=muon"])["optim"]}, model, 1)


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("parent")
    assert run_training(compose([*RUN, "pos=rope", *places(text, folder, "parent")])) == 0
    return folder


def places(text: Path, folder: Path, name: str) -> list[str]:
    return [f"data.path={text}", f"data.cache={folder}/cache", f"out={folder}/{name}"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_finetuned_run_keeps_what_is_frozen_and_says_what_it_trained(
    kind: str, parent: Path, text: Path
) -> None:
    asked = [
        *RUN,
        "pos=rope",
        f"tune={kind}",
        f"init_from={parent}/parent",
        *places(text, parent, kind),
    ]
    assert run_training(compose(asked)) == 0
    before, after = (find(parent / name)[0].model() for name in ("parent", kind))
    summary, theirs = (
        json.loads((parent / name / "summary.json").read_text()) for name in (kind, "parent")
    )
    model = build("mha", "rope", f"tune={kind}")
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    trained = sum(x.numel() for name, x in after.items() if name not in frozen)
    assert summary["params_trained"] == trained < summary["params"]
    assert theirs["params_trained"] == theirs["params"]
    assert summary["gradient_bytes"] == 4 * trained
    tensors = len(after) - len(frozen)
    assert summary["optimizer_bytes"] == 8 * trained + 4 * tensors  # two averages, and a step each
    if kind in SAME_START:
        assert summary["start_val_loss"] == theirs["val_loss"]
    else:
        assert summary["start_val_loss"] != theirs["val_loss"]
    assert summary["flops_per_token"] < theirs["flops_per_token"] * 1.1


def test_every_rank_is_evaluated_after_one_training(parent: Path, text: Path) -> None:
    where = [f"init_from={parent}/parent", *places(text, parent, "ranks")]
    assert run_training(compose([*RUN, "pos=rope", "tune=dylora", "tune.rank=3", *where])) == 0
    assert evaluate([f"run={parent}/ranks", "eval=rank", "threads=1"]) == 0
    rows = json.loads((parent / "ranks/eval/rank.json").read_text())["rows"]
    assert [row["rank"] for row in rows] == [1, 2, 3]
    summary = json.loads((parent / "ranks/summary.json").read_text())
    assert rows[-1]["loss"] == pytest.approx(summary["val_loss"], rel=1e-3)
    assert rows[0]["loss"] != rows[-1]["loss"]
    with pytest.raises(ValueError, match="was not trained with tune=dylora"):
        evaluate([f"run={parent}/parent", "eval=rank", "threads=1"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("tune=lora tune.ratio=0", "tune.ratio=0 must be above 0"),
        ("tune=lora tune.rank=0", "tune.rank=0 must be at least 1"),
        ("tune=lora tune.rank=33", "tune.rank=33 exceeds the width 32 of a layer"),
        ("tune=lora tune.modules=[]", r"tune.modules=\[\] trains nothing"),
        ("tune=lora tune.modules=[w]", "no layer is called w; there are k, out, q, up, v"),
        ("tune=adapter tune.width=0", "tune.width=0 must be at least 1"),
        ("tune=prefix tune.tokens=0", "tune.tokens=0 must be at least 1"),
        ("tune=prefix attn=mla", "MLA has no place for them"),
        ("tune=prefix attn=sliding", "SlidingWindow has no place for them"),
        ("tune=prefix attn=forgetting", "ForgettingAttention has no place for them"),
        ("tune=prefix attn=rank attn.rank=4", "Rank.* has no place for them"),
        ("tune=prompt pos=learned", "come before a context of 16, but learned positions end at 16"),
        ("tune=ptuning tune.width=0", "tune.width=0 must be at least 1"),
    ],
)
def test_what_cannot_be_finetuned_is_refused(overrides: str, message: str) -> None:
    config = compose([*RUN, "attn=gqa", *overrides.split()])
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model(config, 17)


def test_low_rank_parts_count_as_much_in_a_run_that_goes_on(parent: Path, text: Path) -> None:
    asked = [*RUN, "pos=rope", "tune=lora", "tune.rank=4", "steps=2"]
    first = [*places(text, parent, "once"), f"init_from={parent}/parent"]
    assert run_training(compose([*asked, *first])) == 0
    again = [*asked, *places(text, parent, "more"), f"init_from={parent}/once"]
    with pytest.raises(ValueError, match=r"count alpha / rank = 4 times.*: set tune.alpha=16"):
        run_training(compose([*again, "tune.alpha=32"]))
    assert run_training(compose(again)) == 0


def test_low_rank_adaptation_is_that_of_peft() -> None:
    peft = pytest.importorskip("peft", reason="the optional group peers is not installed")
    model, theirs = tuned("lora", "tune.rank=4", "tune.alpha=6"), build("gqa", "rope")
    settings = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v"])
    theirs = peft.inject_adapter_in_model(settings, theirs).eval()
    draw_added(model, 0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in model.added:
                place = name.replace("lora_a", "lora_A.default").replace("lora_b", "lora_B.default")
                theirs.get_parameter(place).copy_(parameter)
    text = tokens(2, 12)
    torch.testing.assert_close(model(text), theirs(text), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(model(text), build("gqa", "rope")(text))
