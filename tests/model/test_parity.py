"""Ours equal published implementations: same weights, same logits, whole and decoded with a cache.

The references are those of transformers, in float32 with eager attention.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.position.rope import inv_freq
from model.position.rope_yarn import YaRN
from model.position.t5 import T5
from model.shape import Shape
from model.transformer import Transformer
from train.config.compose import compose
from train.setup.build import build_model
from train.setup.huggingface import GPT2, LLAMA, renamed, their_weights

transformers = pytest.importorskip(
    "transformers", reason="the optional group peers is not installed"
)

VOCAB = 61
LENGTH = 48
GPT2_RECIPE = ["model.feedforward=gelu_tanh", "model.norm=layernorm", "model.bias=true"]
LLAMA_RECIPE = ["model.feedforward=swiglu", "model.norm=rmsnorm", "model.bias=false"]
SIZES = [
    "model.dim=64",
    "model.n_layers=3",
    "model.n_heads=4",
    f"model.max_len={LENGTH}",
    "data=text",
    "data.path=none",
    "data.tokenizer=char",
]

# Our modules, and what references that are no family of train/setup/huggingface.py call them.
DEEPSEEK = LLAMA.names | {
    "blocks.{}.attention.down": "model.layers.{}.self_attn.kv_a_proj_with_mqa",
    "blocks.{}.attention.norm": "model.layers.{}.self_attn.kv_a_layernorm",
    "blocks.{}.attention.up": "model.layers.{}.self_attn.kv_b_proj",
}
BLOOM = {
    "embed": "transformer.word_embeddings",
    "blocks.{}.attention_norm": "transformer.h.{}.input_layernorm",
    "blocks.{}.attention.qkv": "transformer.h.{}.self_attention.query_key_value",
    "blocks.{}.attention.out": "transformer.h.{}.self_attention.dense",
    "blocks.{}.feedforward_norm": "transformer.h.{}.post_attention_layernorm",
    "blocks.{}.feedforward.up": "transformer.h.{}.mlp.dense_h_to_4h",
    "blocks.{}.feedforward.out": "transformer.h.{}.mlp.dense_4h_to_h",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}

# Overrides of ours, and the parameters of the references; both begin with 32 tokens and read 80.
ROPES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "rope": ([], {"rope_type": "default"}),
    "rope_linear": (["pos.factor=4"], {"rope_type": "linear", "factor": 4.0}),
    # theirs grows with the text: a factor of 2 counts 2 * 80 / 32 - (2 - 1) = 4 times
    "rope_ntk": (["pos.factor=4"], {"rope_type": "dynamic", "factor": 2.0}),
    "rope_yarn": (
        ["pos.factor=4", "pos.original_max_len=32", "pos.beta_fast=1", "pos.beta_slow=0.1"],
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 1.0,
            "beta_slow": 0.1,
        },
    ),
}


def build(*overrides: str) -> Transformer:
    """Our model. Every parameter is drawn, wide enough that attention is far from even."""
    model = build_model(compose([*SIZES, *overrides]), VOCAB).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, middle, 0.2, generator)
    return model


def fused(model: Transformer, heads: int) -> dict[str, Tensor]:
    """Our tensors, q, k and v of each attention joined as `qkv`: in turn for each of the heads."""
    state = model.state_dict()
    for layer in range(model.shape.n_layers):
        where = f"blocks.{layer}.attention"
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{where}.{x}.{kind}").unflatten(0, (heads, -1)) for x in "qkv"]
            state[f"{where}.qkv.{kind}"] = torch.stack(parts, dim=1).flatten(0, 2)
    return state


def reference_of(kind: Any, model: Transformer, state: dict[str, Tensor], **more: Any) -> Any:
    """A published model of our model's sizes, with the tensors of `state`, which must be all."""
    shape = model.shape
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": shape.dim,
        "num_hidden_layers": shape.n_layers,
        "num_attention_heads": shape.n_heads,
        "intermediate_size": model.get_submodule("blocks.0.feedforward.out").in_features,
        "max_position_embeddings": shape.max_len,
        "tie_word_embeddings": shape.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
        "attn_implementation": "eager",
    }
    reference = kind(kind.config_class(**(sizes | more))).eval()
    reference.load_state_dict(state)
    return reference


def llama_of(model: Transformer, kind: Any, **more: Any) -> Any:
    """Llama or one of its relatives, with our tensors."""
    sizes = {
        "num_key_value_heads": model.attention_layers[0].n_kv_heads,
        "head_dim": model.shape.head_dim,
        "rms_norm_eps": 1e-5,
    }
    return reference_of(kind, model, renamed(model.state_dict(), LLAMA.names), **(sizes | more))


def random_tokens(length: int) -> Tensor:
    return torch.randint(VOCAB, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_same(model: Transformer, reference: Any, length: int = LENGTH) -> None:
    """Logits of random tokens agree, read whole and one token at a time with our cache."""
    x = random_tokens(length)
    expected = reference(x, use_cache=False).logits
    assert expected.std() > 0.5  # so that the tolerance means something
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=0)
    cache = model.new_cache(length)
    decoded = torch.cat([model(token, cache) for token in x.split(1, dim=1)], dim=1)
    torch.testing.assert_close(decoded, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn", ["mha", "gqa", "mqa"])
@pytest.mark.parametrize("bias", [False, True])
def test_gqa_with_rope_is_llama(attn: str, bias: bool) -> None:
    model = build(*LLAMA_RECIPE, f"attn={attn}", "pos=rope", f"model.bias={bias}")
    kind = transformers.LlamaForCausalLM
    assert_same(model, llama_of(model, kind, attention_bias=bias, mlp_bias=bias))


@pytest.mark.parametrize("pos", ROPES)
def test_any_rope_is_llama_beyond_its_length(pos: str) -> None:
    overrides, parameters = ROPES[pos]
    model = build(*LLAMA_RECIPE, "attn=gqa", "model.max_len=32", f"pos={pos}", *overrides)
    rope = {"rope_theta": 10000.0, **parameters}
    assert_same(model, llama_of(model, transformers.LlamaForCausalLM, rope_parameters=rope), 80)


@pytest.mark.parametrize(
    ("width", "original", "beta_fast", "beta_slow"), [(16, 32, 1.0, 0.1), (128, 4096, 32.0, 1.0)]
)
def test_yarn_keeps_bends_and_slows_the_pairs_that_llama_does(
    width: int, original: int, beta_fast: float, beta_slow: float
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    shape = Shape(dim=width, n_heads=1, n_layers=1, max_len=original, vocab_size=VOCAB)
    betas = {"beta_fast": beta_fast, "beta_slow": beta_slow}
    yarn = YaRN(shape, base=10000, rotary_fraction=1.0, factor=4.0, original_max_len=None, **betas)
    config = transformers.LlamaConfig(
        head_dim=width,
        max_position_embeddings=4 * original,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": original,
            **betas,
        },
    )
    reference = LlamaRotaryEmbedding(config)
    cpu = torch.device("cpu")
    ours = yarn.inv_freq(width, cpu)
    torch.testing.assert_close(ours, reference.inv_freq, atol=0, rtol=1e-6)
    assert yarn.attention_factor == pytest.approx(reference.attention_scaling, rel=1e-12)
    slower = inv_freq(10000, width, cpu) / ours
    kept, slowed = slower < 1 + 1e-6, slower > 4 - 1e-5
    assert kept.any()
    assert slowed.any()
    assert not (kept | slowed).all()


@pytest.mark.parametrize("pos", ROPES)
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_fraction_of_any_rope_is_stablelm(fraction: float, pos: str) -> None:
    overrides, parameters = ROPES[pos]
    recipe = [*LLAMA_RECIPE, "model.norm=layernorm", "attn=gqa", "model.max_len=32"]
    model = build(*recipe, f"pos={pos}", f"pos.rotary_fraction={fraction}", *overrides)
    state = renamed(model.state_dict(), LLAMA.names)
    zero = torch.zeros(model.shape.dim)  # it has biases in its norms alone, ours in all or none
    state |= {key.replace("weight", "bias"): zero for key in state if "norm" in key}
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": fraction, **parameters}
    kv = {"num_key_value_heads": model.attention_layers[0].n_kv_heads}
    kind = transformers.StableLmForCausalLM
    assert_same(model, reference_of(kind, model, state, rope_parameters=rope, **kv), 80)


@pytest.mark.parametrize("n_heads", [4, 6, 7])
def test_alibi_is_bloom_with_any_number_of_heads(n_heads: int) -> None:
    sizes = [f"model.n_heads={n_heads}", f"model.dim={16 * n_heads}", "model.tie_embeddings=true"]
    model = build(*GPT2_RECIPE, *sizes, "attn=mha", "pos=alibi")
    state = renamed(fused(model, n_heads), BLOOM)
    for name in ("weight", "bias"):  # a norm of the embeddings that ours does not have
        state[f"transformer.word_embeddings_layernorm.{name}"] = torch.zeros(16 * n_heads)
    reference = reference_of(transformers.BloomForCausalLM, model, state)
    reference.transformer.word_embeddings_layernorm = nn.Identity()
    assert_same(model, reference)


@pytest.mark.parametrize(
    ("n_buckets", "max_distance"), [(32, 128), (16, 64), (64, 1000), (8, 20), (5, 17), (2, 4)]
)
def test_t5_buckets_and_biases_are_t5s(n_buckets: int, max_distance: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    shape = Shape(dim=32, n_heads=4, n_layers=1, max_len=LENGTH, vocab_size=VOCAB)
    t5 = T5(shape, n_buckets=n_buckets, max_distance=max_distance)
    distance = torch.arange(1001)
    expected = T5Attention._relative_position_bucket(-distance, False, n_buckets, max_distance)
    assert torch.equal(t5.bucket(distance), expected)

    config = transformers.T5Config(
        num_heads=4,
        relative_attention_num_buckets=n_buckets,
        relative_attention_max_distance=max_distance,
        is_decoder=True,
    )
    reference = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    reference.relative_attention_bias.weight = nn.init.normal_(t5.table.weight)
    bias, pos = reference.compute_bias(1001, 1001)[0], torch.arange(1001)
    assert torch.equal(t5.bias(pos, pos).tril(), bias.tril())


@pytest.mark.parametrize("window", [1, 4, 5, 46, 101])
def test_sliding_is_mistral(window: int) -> None:
    length = 150  # two or three blocks of queries
    sizes = [*LLAMA_RECIPE, "pos=rope", "attn.n_kv_heads=2"]
    model = build(*sizes, "attn=sliding", f"attn.window={window}")
    kind = transformers.MistralForCausalLM
    assert_same(model, llama_of(model, kind, sliding_window=window), length)
    full, x = build(*sizes, "attn=gqa"), random_tokens(length)
    assert_same(full, llama_of(full, kind, sliding_window=None), length)
    with torch.no_grad():  # the same weights, so all that differs is the window
        assert (model(x) - full(x)).abs().max() > 0.1


def test_a_pattern_is_ministral() -> None:
    sizes = ["attn.local.window=11", "attn.pattern=[local,local,global]", "model.n_layers=4"]
    model = build(*LLAMA_RECIPE, "pos=rope", "attn=pattern", *sizes)
    layers = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    kind = transformers.MinistralForCausalLM
    reference = llama_of(model, kind, sliding_window=11, layer_types=layers)
    assert_same(model, reference)


@pytest.mark.parametrize(("latent", "rope"), [(24, 8), (64, 16), (8, 2)])
def test_mla_is_deepseek(latent: int, rope: int) -> None:
    sizes = [f"attn.latent_dim={latent}", f"attn.rope_dim={rope}"]
    model = build(*LLAMA_RECIPE, "attn=mla", "pos=rope", *sizes)
    reference = reference_of(
        transformers.DeepseekV3ForCausalLM,
        model,
        renamed(model.state_dict(), DEEPSEEK),
        num_key_value_heads=model.shape.n_heads,
        q_lora_rank=None,
        kv_lora_rank=latent,
        qk_nope_head_dim=model.shape.head_dim,
        qk_rope_head_dim=rope,
        v_head_dim=model.shape.head_dim,
        first_k_dense_replace=model.shape.n_layers,
        rope_interleave=False,
        rms_norm_eps=1e-5,
    )
    # The norm of the latent has eps 1e-6 there whatever the config says; all of ours have 1e-5.
    for layer in reference.model.layers:
        layer.self_attn.kv_a_layernorm.variance_epsilon = 1e-5
    assert_same(model, reference)


def test_learned_positions_and_gelu_are_gpt2() -> None:
    model = build(*GPT2_RECIPE, "attn=mha", "pos=learned", "model.tie_embeddings=true")
    state = their_weights(GPT2, model)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    reference = reference_of(
        transformers.GPT2LMHeadModel, model, state, activation_function="gelu_new"
    )
    assert_same(model, reference)
