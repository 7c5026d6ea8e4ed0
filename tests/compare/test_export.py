"""Folders of transformers: ours are loaded there with the same logits and tokens, theirs start runs."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from cli.export import main
from compare.evaluate.export import export
from compare.evaluate.load import LoadedRun
from compare.report.runs import read
from data import tokenizer as tokenizers
from data.tokenizer import encode
from model.loss import token_nll
from model.transformer import Transformer
from train.config.compose import compose
from train.config.schema import Config
from train.measure.device import Device
from train.record.checkpoint import find
from train.record.run_folder import open_config
from train.run import run_training
from train.setup.build import build_model, init_model
from train.setup.huggingface import FAMILIES, our_weights, overrides_of
from train.setup.run_setup import assemble, check
from train.setup.weights import load_weights

transformers = pytest.importorskip(
    "transformers", reason="the optional group peers is not installed"
)
transformers.utils.logging.disable_progress_bar()

Make = Callable[..., Config]
LENGTH = 48
SIZES = f"model.dim=48 model.n_layers=2 model.n_heads=6 model.max_len={LENGTH}".split()
LLAMA = "model.feedforward=swiglu model.norm=rmsnorm model.bias=false pos=rope"
BIGCODE = "model.feedforward=gelu_tanh model.norm=layernorm pos=rope"
HOMES = [
    ("LlamaForCausalLM", f"{LLAMA} attn=mha"),
    ("LlamaForCausalLM", f"{LLAMA} attn=gqa pos.base=500 model.tie_embeddings=false"),
    ("LlamaForCausalLM", f"{LLAMA} attn=mqa model.bias=true model.vocab_size=300"),
    ("LlamaForCausalLM", f"{LLAMA} attn=gqa pos=rope_linear pos.factor=4"),
    ("LlamaForCausalLM", f"{LLAMA} attn=gqa pos=rope_ntk pos.factor=3"),
    ("LlamaForCausalLM", f"{LLAMA} attn=gqa pos=rope_yarn pos.factor=4 pos.original_max_len=32 pos.beta_fast=1 pos.beta_slow=0.1"),
    ("MistralForCausalLM", f"{LLAMA} attn=sliding attn.window=11"),
    ("MistralForCausalLM", f"{LLAMA} attn=sliding attn.window=2 attn.n_kv_heads=2 pos=rope_linear"),
    ("Qwen3ForCausalLM", f"{LLAMA} attn.qk_norm=true"),
    ("Qwen3ForCausalLM", f"{LLAMA} attn=gqa attn.qk_norm=true pos=rope_linear model.tie_embeddings=false"),
    ("Starcoder2ForCausalLM", f"{BIGCODE} attn=mha"),
    ("Starcoder2ForCausalLM", f"{BIGCODE} attn=gqa model.bias=true pos=rope_yarn pos.beta_fast=3"),
    ("Starcoder2ForCausalLM", f"{BIGCODE} attn=mqa model.feedforward=relu2 model.tie_embeddings=false"),
    ("Starcoder2ForCausalLM", f"{BIGCODE} attn=sliding attn.window=9 attn.n_kv_heads=3 model.feedforward=gelu"),
    ("GPT2LMHeadModel", "attn=mha pos=learned model.bias=true"),
    ("GPT2LMHeadModel", "attn=gqa pos=sinusoidal pos.amplitude=0.5 model.feedforward=relu2"),
    ("GPT2LMHeadModel", "attn=mqa pos=none model.feedforward=gelu model.tie_embeddings=false"),
    ("GPT2LMHeadModel", "attn=gqa attn.n_kv_heads=3 pos=learned model.ff_dim=72"),
    ("MptForCausalLM", "attn=mha pos=alibi model.feedforward=gelu"),
    ("MptForCausalLM", "attn=gqa pos=alibi model.feedforward=gelu model.n_heads=4 model.ff_dim=192"),
    ("MptForCausalLM", "attn=mqa pos=alibi model.feedforward=gelu model.n_heads=8 model.tie_embeddings=false"),
]  # fmt: skip


def opened(folder: Path, overrides: str, tokenizer: Tokenizer | None = None) -> LoadedRun:
    """A model as if its run had been opened. Parameters are wide: attention is far from even."""
    tokenizer = tokenizer or tokenizers.raw_bytes()
    config = compose([*SIZES, *overrides.split()])
    model = build_model(config, tokenizer.get_vocab_size()).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, middle, 0.2, generator)
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.to_str(), encoding="utf-8")
    return LoadedRun(folder, config, tokenizer, None, model, Device("cpu", torch.float32))


def load(folder: Path) -> Any:
    kind = transformers.AutoModelForCausalLM
    return kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()


def random_tokens(vocab: int = 256, length: int = LENGTH) -> Tensor:
    return torch.randint(vocab, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(ours: Transformer, theirs: Any) -> float:
    x = random_tokens(ours.shape.vocab_size, ours.shape.max_len)
    expected = theirs(x, use_cache=False).logits
    assert expected.std() > 0.5  # so that the tolerance means something
    torch.testing.assert_close(ours(x), expected, atol=1e-4, rtol=0)
    return (ours(x) - expected).abs().max().item()


def started(
    folder: Path, before: Config, now: Config | None = None, how: str = "mean"
) -> Transformer:
    """A model with the weights of a folder: that of the config there, or of another."""
    model = build_model(now or before, before["model"]["vocab_size"])
    init_model(model, now or before, seed=3)
    load_weights(our_weights(folder), before, model, how, "")
    return model.eval()


def read_back(folder: Path) -> Transformer:
    """The model that a folder says it is."""
    return started(folder, compose(overrides_of(folder)))


@pytest.mark.parametrize(("architecture", "overrides"), HOMES)
def test_a_home_computes_the_same_and_gives_the_weights_back(
    tmp_path: Path, architecture: str, overrides: str
) -> None:
    run = opened(tmp_path / "run", overrides)
    said = export(run, tmp_path / "hf")
    assert f"{architecture}, checked with transformers" in said
    theirs = load(tmp_path / "hf")
    assert type(theirs).__name__ == architecture
    apart = assert_same(run.model, theirs)
    print(f"{architecture} {overrides}: {apart:.1e}")
    written = theirs.generate(random_tokens(length=30), max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        assert torch.equal(run.model(written)[:, 29:-1].argmax(-1), written[:, 30:])
    before = compose(overrides_of(tmp_path / "hf"))
    for how in ("mean", "first"):
        again = dict(started(tmp_path / "hf", before, run.config, how).named_parameters())
        for name, parameter in run.model.named_parameters():
            assert torch.equal(again[name], parameter), name
    assert_same(started(tmp_path / "hf", before), theirs)  # the model that the folder says it is


def test_every_family_is_tested() -> None:
    assert {architecture for architecture, _ in HOMES} == {f.architecture for f in FAMILIES}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (f"{LLAMA} attn=mla", "LlamaForCausalLM has no attn=mla; MistralForCausalLM"),
        (f"{LLAMA} attn=pattern", "LlamaForCausalLM has no attn=pattern;"),
        (f"{LLAMA} attn=mha pos=t5", "LlamaForCausalLM has no pos=t5;"),
        (f"{LLAMA} attn=mha pos.rotary_fraction=0.5", "LlamaForCausalLM has no pos.rotary_fraction=0.5;"),
        (f"{LLAMA} attn=sliding model.bias=true", "MistralForCausalLM has no model.bias=true;"),
        (f"{LLAMA} attn=mha pos=learned", "GPT2LMHeadModel has no model.norm=rmsnorm model.feedforward=swiglu;"),
        ("attn=sliding pos=learned", "GPT2LMHeadModel has no attn=sliding;"),
        ("attn=mha pos=alibi model.feedforward=gelu_tanh", "MptForCausalLM has no model.feedforward=gelu_tanh$"),
        ("attn=mha pos=alibi model.feedforward=gelu model.ff_dim=100", "MptForCausalLM has no model.ff_dim=100$"),
    ],
)  # fmt: skip
def test_what_has_no_home_is_refused_by_its_keys(
    tmp_path: Path, overrides: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        export(opened(tmp_path / "run", overrides), tmp_path / "hf")
    assert "\n" not in str(error.value)
    assert all(family.architecture in str(error.value) for family in FAMILIES)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_export_that_computes_something_else_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path / "run", "attn=gqa pos=rope")
    wrong = their_config_with(norm_epsilon=1e-3)
    monkeypatch.setattr("compare.evaluate.export.their_config", wrong)
    with pytest.raises(ValueError, match="exported model's logits differ"):
        export(run, tmp_path / "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def their_config_with(**more: Any) -> Callable[..., dict[str, Any]]:
    from compare.evaluate.export import their_config

    return lambda *given: their_config(*given) | more


def test_without_transformers_it_is_said_that_nothing_was_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    said = export(opened(tmp_path / "run", "attn=mha pos=rope"), tmp_path / "hf")
    assert "not checked" in said
    assert '".[peers]"' in said
    assert (tmp_path / "hf/model.safetensors").exists()


def mixed_text() -> str:
    """About 1 MB of what tokenizers stumble over, and the marker that ends a document."""
    odd = [
        "<|endoftext|>",
        "👩‍👩‍👧‍👦🏳️‍🌈",
        "漢字かな交じり文 ",
        "e\u0301\u0323 ñ ﬁ ",
        "\0",
        "\r\n",
        "\t  ",
        " \u00a0\u2028",
    ]
    odd += [
        "עברית",
        "naïve café's they'll",
        "1234567 3.14",
        "<|endoftext",
        "▁Ġ",
        "\ufeff",
        "İıſ",
        "don't  \n\n\n x",
    ]
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(odd), (90_000,), generator=generator).tolist()
    planes = "".join(chr(c) for c in range(1, 0x2FFFF, 7) if not 0xD800 <= c < 0xE000)
    return "".join(odd[i] for i in picks) + planes  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("byte", f"{LLAMA} attn=sliding"),
        ("bpe", "attn=mha pos=learned"),
        ("char", "attn=mha pos=rope"),
    ],
)
def test_tokens_are_the_same(tmp_path: Path, kind: str, overrides: str) -> None:
    text = mixed_text()
    assert 1e6 < len(text.encode()) < 2e6
    if kind == "char":
        text = text[:50_000] + text[-40_000:]
    tokenizer = tokenizers.build(kind, [text[:40_000]], [text], 500)
    tokenizer = tokenizers.from_text(tokenizer.to_str())
    export(opened(tmp_path / "run", overrides, tokenizer), tmp_path / "hf")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", local_files_only=True)
    ids = encode(tokenizer, text)
    assert theirs(text)["input_ids"] == ids
    assert theirs.decode(ids) == text
    end = tokenizer.token_to_id("<|endoftext|>")
    assert (theirs.eos_token_id, theirs.bos_token_id) == (end, end)
    assert (end is not None) == (kind == "bpe")
    model = load(tmp_path / "hf")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (end, end)


@pytest.mark.parametrize("overrides", ["attn=gqa pos=learned", f"{LLAMA} attn=sliding"])
def test_the_ruler_gives_the_exported_model_the_same_score(tmp_path: Path, overrides: str) -> None:
    """Scored here in overlapping windows; there token by token, each after the same context."""
    run = opened(tmp_path / "run", overrides)
    export(run, tmp_path / "hf")
    tokens = torch.tensor(encode(run.tokenizer, mixed_text()[:150]))
    context, stride = 32, 12
    nats = token_nll(run.model, tokens, context=context, stride=stride, batch_size=4, device="cpu")
    theirs = load(tmp_path / "hf")
    total, count, start, scored = 0.0, 0, 0, 1
    while scored < len(tokens):
        window = tokens[start : start + context + 1][None]
        with torch.no_grad():
            losses = F.cross_entropy(
                theirs(window[:, :-1]).logits[0].double(), window[0, 1:], reduction="none"
            )
        fresh = losses[scored - start - 1 :]
        total, count = total + fresh.sum().item(), count + len(fresh)
        scored, start = start + window.size(1), start + stride
    assert count == len(nats)
    assert nats.double().sum().item() == pytest.approx(total, rel=1e-4)


# ------------------------------------------------------------------------------- and back


def third_party(folder: Path, kind: str, **keys: Any) -> Any:
    """A random model that transformers itself made and saved, with a tokenizer of bytes."""
    config = getattr(transformers, f"{kind}Config")
    architecture = next(f.architecture for f in FAMILIES if f.model_type == config.model_type)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config(vocab_size=256, **keys)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizers.raw_bytes().to_str(), encoding="utf-8")
    return model


WIDE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LONG = {"intermediate_size": 48, "max_position_embeddings": 40, "rms_norm_eps": 1e-5}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10, "beta_fast": 2}
THEIRS: list[tuple[str, dict[str, Any]]] = [
    ("Llama", WIDE | LONG | {"num_key_value_heads": 2, "attention_bias": True}),
    ("Llama", WIDE | LONG | {"tie_word_embeddings": True, "mlp_bias": True}),
    ("Llama", WIDE | LONG | {"rope_parameters": {"rope_theta": 77.5, "rope_type": "default"}}),
    ("Llama", WIDE | LONG | {"rope_parameters": YARN | {"rope_theta": 100.0}}),
    ("Mistral", WIDE | LONG | {"sliding_window": 7, "num_key_value_heads": 1}),
    ("Mistral", WIDE | LONG | {"sliding_window": None, "num_key_value_heads": 2}),
    ("Starcoder2", WIDE | LONG | {"num_key_value_heads": 2}),
    ("Starcoder2", WIDE | LONG | {"use_bias": False, "hidden_act": "gelu", "sliding_window": 5}),
    ("GPT2", GPT2),
    ("GPT2", GPT2 | {"n_inner": 40, "activation_function": "relu2", "tie_word_embeddings": False}),
    ("Mpt", {"d_model": 48, "n_layers": 2, "n_heads": 6, "max_seq_len": 40}),
]


@pytest.mark.parametrize(("kind", "keys"), THEIRS)
def test_a_third_partys_model_computes_the_same_here(
    tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    theirs = third_party(tmp_path / "hf", kind, **keys)
    assert_same(read_back(tmp_path / "hf"), theirs)


def test_shards_of_bfloat16_are_read(tmp_path: Path) -> None:
    theirs = third_party(tmp_path / "one", "Llama", **WIDE, **LONG).bfloat16()
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    shutil.copy(tmp_path / "one/tokenizer.json", tmp_path / "hf")
    assert not (tmp_path / "hf/model.safetensors").exists()
    model = read_back(tmp_path / "hf")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert_same(model, load(tmp_path / "hf"))
    next((tmp_path / "hf").glob("*2-of*.safetensors")).unlink()
    with pytest.raises(ValueError, match="hf has no model-00002-of"):
        our_weights(tmp_path / "hf")


def rewrite(folder: Path, drop: str = "", **keys: Any) -> None:
    """Change a folder's config.json."""
    config = json.loads((folder / "config.json").read_text()) | keys
    kept = {key: value for key, value in config.items() if key not in drop.split()}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "older",
    [
        {"rope_theta": 99.0, "rope_scaling": None},
        {"rope_theta": 99.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 99.0, "rope_scaling": YARN},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4}},
        {},
    ],
)
def test_keys_of_older_configs_are_understood(tmp_path: Path, older: dict[str, Any]) -> None:
    third_party(tmp_path / "hf", "Llama", **WIDE, **LONG)
    rewrite(tmp_path / "hf", "rope_parameters head_dim num_key_value_heads", **older)
    model = read_back(tmp_path / "hf")
    assert_same(model, load(tmp_path / "hf"))


@pytest.mark.parametrize(("kind", "keys"), [("GPT2", GPT2), ("Llama", WIDE | LONG)])
def test_an_old_checkpoint_may_hold_buffers_and_shorter_names(
    tmp_path: Path, kind: str, keys: dict[str, Any]
) -> None:
    theirs = third_party(tmp_path / "hf", kind, **keys)
    path = tmp_path / "hf/model.safetensors"
    bare = {
        name.partition(".")[2]: x for name, x in load_file(path).items() if "lm_head" not in name
    }
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 40, 40), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    bare |= {"layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    head = {} if kind == "GPT2" else {"lm_head.weight": theirs.lm_head.weight.detach()}
    save_file(bare | head, path)
    assert_same(read_back(tmp_path / "hf"), theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bloom"}, "model_type=bloom is not one of llama, mistral, qwen3, starcoder2, gpt2, mpt"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06; ours would be rms_norm_eps=1e-05"),
        ({"drop": "rms_norm_eps"}, "rms_norm_eps=1e-06; ours"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu; ours would be hidden_act=silu"),
        ({"head_dim": 16}, "head_dim=16: ours would be 32 / 4"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_type=llama3 is not one of default, linear, yarn"),
        ({"rope_scaling": {"type": "dynamic", "factor": 8.0}}, "rope_type=dynamic is not one of"),
        ({"rope_parameters": YARN | {"mscale": 0.7}}, "mscale=0.7 is an unsupported RoPE parameter"),
        ({"rope_parameters": YARN | {"truncate": False}}, "truncate=False is an unsupported"),
        ({"rope_parameters": YARN | {"attention_factor": 1.5}}, "attention_factor=1.5 is an"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is an unsupported RoPE parameter"),
        ({"drop": "hidden_size"}, "config.json has no hidden_size"),
        ({"hidden_size": "${oc.env:HOME}"}, "hidden_size=.* is not a number"),
        ({"num_attention_heads": 5}, "ours would be 32 / 5"),
        ({"num_attention_heads": None}, "config.json has no num_attention_heads"),
        ({"rope_parameters": YARN | {"factor": "four"}}, "hf: must be real number"),
    ],
)  # fmt: skip
def test_a_folder_of_another_model_is_refused_in_one_line(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    third_party(tmp_path / "hf", "Llama", **WIDE, **LONG)
    rewrite(tmp_path / "hf", **change)
    with pytest.raises(ValueError, match=message) as error:
        overrides_of(tmp_path / "hf")
    assert str(tmp_path / "hf") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "keys", "change", "message"),
    [
        ("GPT2", GPT2, {"activation_function": "relu"}, "activation_function=relu is not one of gelu_pytorch"),
        ("GPT2", GPT2, {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=true; ours would be"),
        ("GPT2", GPT2, {"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; ours"),
        ("Mpt", {"d_model": 32, "n_layers": 1, "n_heads": 4}, {"attn_config": {"clip_qkv": 6}}, "attn_config.clip_qkv=6; ours would be clip_qkv=null"),
    ],
)  # fmt: skip
def test_so_is_one_of_another_family(
    tmp_path: Path, kind: str, keys: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    third_party(tmp_path / "hf", kind, **keys)
    rewrite(tmp_path / "hf", **change)
    with pytest.raises(ValueError, match=message):
        overrides_of(tmp_path / "hf")


def test_pickled_weights_are_never_opened(
    tmp_path: Path, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    third_party(tmp_path / "hf", "Llama", **WIDE, **LONG)
    (tmp_path / "hf/model.safetensors").rename(tmp_path / "hf/pytorch_model.bin")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    (tmp_path / "hf/pytorch_model.bin").chmod(0)
    asked = config(f"init_from={tmp_path}/hf")
    with pytest.raises(ValueError, match="pytorch_model.bin could run code and is not opened"):
        check(asked)
    (tmp_path / "hf/pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="hf has no model.safetensors"):
        check(asked)


def test_damaged_and_foreign_tensors_are_refused(tmp_path: Path) -> None:
    third_party(tmp_path / "hf", "Llama", **WIDE, **LONG)
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, path)
    with pytest.raises(
        ValueError, match=r"layers.0.self_attn.q_norm.weight is no tensor of a model"
    ):
        our_weights(tmp_path / "hf")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors: "):
        our_weights(tmp_path / "hf")


# ------------------------------------------------------------------------------- runs


def exported(run: Path, to: Path, *more: str) -> str:
    assert main([f"run={run}", f"to={to}", *more]) == 0
    return str(to)


def test_a_run_is_exported_and_goes_on_from_there(
    config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gqa = ["attn=gqa", "pos=sinusoidal", "data.tokenizer=bpe", "data.vocab_size=300"]
    assert run_training(config(*gqa, "steps=6", "save_every=3")) == 0
    hf = exported(tmp_path / "run", tmp_path / "hf")
    assert f"{hf}: GPT2LMHeadModel, checked with transformers" in capsys.readouterr().out
    job = assemble(check(config(*gqa, f"init_from={hf}", "seed=9")))
    parent = find(tmp_path / "run")[0]
    for name, weight in parent.model().items():
        assert torch.equal(job.model.get_parameter(name), weight), name
    assert job.parent == {"run": hf, "step": None, "parent": None}
    assert "the model there has attn=mha pos=learned, this one attn=gqa pos=sinusoidal" in (
        capsys.readouterr().err
    )
    asked = [*gqa, f"init_from={hf}", "save_every=2"]
    assert run_training(config(*asked, "steps=4", f"out={tmp_path}/a")) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["parent"]["run"] == hf
    before = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["start_val_loss"] == pytest.approx(before["val_loss"], rel=1e-6)
    assert run_training(config(*asked, "steps=2", f"out={tmp_path}/b")) == 0
    assert run_training(config(*asked, "steps=4", f"out={tmp_path}/b", "resume=true")) == 0
    ends = [find(tmp_path / run)[0].model() for run in ("a", "b")]
    assert all(torch.equal(ends[0][name], weight) for name, weight in ends[1].items())
    report = json.loads((tmp_path / "b/summary.json").read_text())
    assert report["parent"] == {"run": hf, "step": None, "parent": None}
    first = exported(tmp_path / "run", tmp_path / "first", "checkpoint=3")
    assert not torch.equal(
        our_weights(Path(first))["embed.weight"], our_weights(Path(hf))["embed.weight"]
    )


def test_a_low_rank_part_is_merged_and_other_additions_are_refused(
    config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["attn=mha", "pos=learned", "data.tokenizer=bpe", "data.vocab_size=300"]
    assert run_training(config(*base, f"out={tmp_path}/base")) == 0
    after = [*base, f"init_from={tmp_path}/base", "optim.lr=0.1"]
    assert run_training(config(*after, "tune=lora", f"out={tmp_path}/lora")) == 0
    exported(tmp_path / "lora", tmp_path / "hf")
    assert "GPT2LMHeadModel, checked with transformers" in capsys.readouterr().out
    assert run_training(config(*after, "tune=adapter", f"out={tmp_path}/adapter")) == 0
    with pytest.raises(ValueError, match="adapter: adapter cannot be merged into the weights"):
        exported(tmp_path / "adapter", tmp_path / "other")


def test_what_does_not_fit_is_told_what_would(config: Make, tmp_path: Path) -> None:
    theirs = third_party(tmp_path / "hf", "Llama", **WIDE, **LONG, num_key_value_heads=2)
    start = f"init_from={tmp_path}/hf"
    fits = (
        "model=llama model.vocab_size=256 model.dim=32 model.n_layers=2 model.n_heads=4 "
        "model.ff_dim=48 model.max_len=40 model.tie_embeddings=false model.bias=false "
        "model.feedforward=swiglu model.norm=rmsnorm attn=gqa attn.n_kv_heads=2 pos=rope "
        "pos.base=10000"
    )
    for wrong in ("model.dim=64", "model.n_heads=2", "attn=mha pos=rope", "attn=mla pos=rope"):
        with pytest.raises(ValueError, match=f"init_from=.*; what fits is {fits}$"):
            check(config(start, *wrong.split()))
    with pytest.raises(
        ValueError, match=rf"tokenizer mismatch; set data.tokenizer={tmp_path}/hf/tok"
    ):
        assemble(check(config(start, *fits.split(), "data.tokenizer=char")))
    tokenizer = f"data.tokenizer={tmp_path}/hf/tokenizer.json"
    with pytest.raises(ValueError, match=f"position.table.weight is missing; what fits is {fits}"):
        assemble(check(config(start, *fits.split()[:-2], "pos=learned", tokenizer)))
    job = assemble(check(config(start, *fits.split(), tokenizer, "model.max_len=20")))
    assert_same(job.model.eval(), theirs)
    (tmp_path / "hf/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="hf has no tokenizer.json"):
        check(config(start, *fits.split(), "data.tokenizer=byte"))


def test_a_folder_of_theirs_is_no_run(config: Make, tmp_path: Path) -> None:
    export(opened(tmp_path / "run", "attn=mha pos=rope"), tmp_path / "hf")
    with pytest.raises(
        ValueError, match="is not a run but a folder of transformers; pass it as init_from"
    ):
        open_config(tmp_path / "hf")
    (tmp_path / "run/summary.json").write_text("{}")
    assert [run.folder.name for run in read([tmp_path])] == ["run"]
    with pytest.raises(ValueError, match="hf holds other files"):
        run_training(config(f"out={tmp_path}/hf", "resume=true"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run={run}"], "to is missing"),
        (["run={run}", "to={run}"], "exists and is not an empty folder"),
        (["run={run}", "to=x", "checkpoint=7", "chekpoint=1"], "did you mean checkpoint"),
        (["run={run}", "to=x", "dtype=bfloat16"], "dtype: no such key"),
        (["run={run}/no", "to=x"], "is not a run"),
    ],
)
def test_a_wrong_command_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=message):
        main([argument.format(run=run) for argument in arguments])
