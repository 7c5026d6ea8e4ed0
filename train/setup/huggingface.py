"""Conversion to and from model folders of Hugging Face transformers.

A family is data that both directions read. transformers itself is not needed: a folder is JSON and
safetensors, and nothing else of it is opened.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from data.atomic import read_json
from model.attention.grouped import GQA
from model.position.rope import RoPE
from model.position.rope_ntk import NTKRoPE
from model.transformer import Transformer
from train.config.schema import Config
from train.record.checkpoint import load_tensors
from train.setup.convert import table_of

Keys = dict[str, Any]  # a config, flat: {"attn": "gqa", "attn.n_kv_heads": 2, "model.dim": 64, ...}


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of transformers: the configs of ours that it covers, and its names for them."""

    model_type: str
    architecture: str
    fits: dict[
        str, tuple[Any, ...]
    ]  # values that our keys may have; an imported model gets the first
    keys: dict[str, str]  # our sizes and choices: its keys
    names: dict[str, str]  # our modules: its modules; {} is the layer
    fixed: dict[str, Any]  # its keys with one possible value
    left_out: dict[str, Any]  # its defaults for keys missing in a config
    feedforwards: dict[str, str] = field(default_factory=dict)  # its names: ours
    dropouts: tuple[str, ...] = ()  # its keys of dropout
    biases: tuple[str, ...] = ()  # its keys of biases
    always_biased: tuple[
        int, ...
    ] = ()  # weights of so many dimensions have a bias, whatever is asked
    transposed: bool = False  # matrices are (in, out)


def pairs(text: str) -> dict[str, str]:
    """{"a": "b", "c": "d"} of "a=b c=d"."""
    return dict(word.split("=") for word in text.split())


def layered(whole: str, layers: str, each: str) -> dict[str, str]:
    """Names of modules, ours=theirs: those of the whole model, and those of each layer."""
    inner = {f"blocks.{{}}.{a}": f"{layers}.{{}}.{b}" for a, b in pairs(each).items()}
    return pairs(whole) | inner


GROUPED = ("mha", "gqa", "mqa")
ROPES = ("rope", "rope_linear", "rope_ntk", "rope_yarn")
SCALINGS = {  # of rotary positions: their rope_type, and our keys with theirs
    "rope": ("default", {}),
    "rope_linear": ("linear", pairs("factor=factor")),
    "rope_yarn": (
        "yarn",
        pairs(
            "factor=factor original_max_len=original_max_position_embeddings "
            "beta_fast=beta_fast beta_slow=beta_slow"
        ),
    ),
}
GELUS = pairs("gelu_pytorch_tanh=gelu_tanh gelu_new=gelu_tanh gelu=gelu relu2=relu2")
LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fits={
        "attn": GROUPED,
        "attn.qk_norm": (False,),
        "pos": ROPES,
        "pos.rotary_fraction": (1.0,),
        "model.norm": ("rmsnorm",),
        "model.feedforward": ("swiglu",),
    },
    keys=pairs(
        "vocab_size=vocab_size dim=hidden_size n_layers=num_hidden_layers "
        "n_heads=num_attention_heads n_kv_heads=num_key_value_heads ff_dim=intermediate_size "
        "max_len=max_position_embeddings tie_embeddings=tie_word_embeddings"
    ),
    names=layered(
        "embed=model.embed_tokens norm=model.norm head=lm_head",
        "model.layers",
        "attention_norm=input_layernorm feedforward_norm=post_attention_layernorm "
        "attention.q=self_attn.q_proj attention.k=self_attn.k_proj attention.v=self_attn.v_proj "
        "attention.out=self_attn.o_proj feedforward.gate=mlp.gate_proj feedforward.up=mlp.up_proj "
        "feedforward.out=mlp.down_proj",
    ),
    fixed={"hidden_act": "silu", "rms_norm_eps": 1e-5},
    left_out={"rms_norm_eps": 1e-6, "num_key_value_heads": None, "tie_word_embeddings": False},
    dropouts=("attention_dropout",),
    biases=("attention_bias", "mlp_bias"),
)
MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    architecture="MistralForCausalLM",
    fits=LLAMA.fits | {"attn": ("sliding",), "model.bias": (False,)},
    keys=LLAMA.keys | {"window": "sliding_window"},
    left_out=LLAMA.left_out | {"num_key_value_heads": 8, "sliding_window": 4096},
    biases=(),
)
QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fits=LLAMA.fits | {"attn": GROUPED, "attn.qk_norm": (True,), "model.bias": (False,)},
    keys=LLAMA.keys | {"head_dim": "head_dim"},
    names=LLAMA.names
    | layered(
        "",
        "model.layers",
        "attention.q_norm=self_attn.q_norm attention.k_norm=self_attn.k_norm",
    ),
    fixed=LLAMA.fixed | {"use_sliding_window": False, "attention_bias": False},
    left_out=LLAMA.left_out | {"num_key_value_heads": 32, "head_dim": 128},
    biases=(),
)
STARCODER2 = replace(
    LLAMA,
    model_type="starcoder2",
    architecture="Starcoder2ForCausalLM",
    fits=LLAMA.fits
    | {
        "attn": (*GROUPED, "sliding"),
        "model.norm": ("layernorm",),
        "model.feedforward": tuple(GELUS.values()),
    },
    keys=LLAMA.keys | {"window": "sliding_window", "feedforward": "hidden_act"},
    names=LLAMA.names
    | layered("", "model.layers", "feedforward.up=mlp.c_fc feedforward.out=mlp.c_proj"),
    fixed={"norm_epsilon": 1e-5},
    left_out={
        "hidden_act": "gelu_pytorch_tanh",
        "num_key_value_heads": 2,
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    feedforwards=GELUS,
    dropouts=("attention_dropout", "residual_dropout", "embedding_dropout"),
    biases=("use_bias",),
    always_biased=(1,),
)
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    fits={
        "attn": GROUPED,
        "attn.qk_norm": (False,),
        "pos": ("learned", "sinusoidal", "none"),
        "model.norm": ("layernorm",),
        "model.feedforward": tuple(GELUS.values()),
    },
    keys=pairs(
        "vocab_size=vocab_size dim=n_embd n_layers=n_layer n_heads=n_head ff_dim=n_inner "
        "max_len=n_positions tie_embeddings=tie_word_embeddings feedforward=activation_function"
    ),
    names=layered(
        "embed=transformer.wte position.table=transformer.wpe norm=transformer.ln_f head=lm_head",
        "transformer.h",
        "attention_norm=ln_1 attention.qkv=attn.c_attn attention.out=attn.c_proj "
        "feedforward_norm=ln_2 feedforward.up=mlp.c_fc feedforward.out=mlp.c_proj",
    ),
    fixed={
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    left_out={"n_inner": None, "activation_function": "gelu_new", "tie_word_embeddings": True},
    feedforwards=GELUS,
    dropouts=("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    always_biased=(1, 2),
    transposed=True,
)
MPT = Family(
    model_type="mpt",
    architecture="MptForCausalLM",
    fits={
        "attn": GROUPED,
        "attn.qk_norm": (False,),
        "pos": ("alibi",),
        "model.norm": ("layernorm",),
        "model.feedforward": ("gelu",),
        "model.bias": (False,),
        "model.ff_dim": (None,),
    },
    keys=pairs(
        "vocab_size=vocab_size dim=d_model n_layers=n_layers n_heads=n_heads max_len=max_seq_len "
        "tie_embeddings=tie_word_embeddings"
    ),
    names=layered(
        "embed=transformer.wte norm=transformer.norm_f head=lm_head",
        "transformer.blocks",
        "attention_norm=norm_1 attention.qkv=attn.Wqkv attention.out=attn.out_proj "
        "feedforward_norm=norm_2 feedforward.up=ffn.up_proj feedforward.out=ffn.down_proj",
    ),
    fixed={
        "layer_norm_epsilon": 1e-5,
        "expansion_ratio": 4,
        "no_bias": True,
        "logit_scale": None,
        "attn_config": {
            "attn_type": "multihead_attention",
            "alibi": True,
            "alibi_bias_max": 8,
            "softmax_scale": None,
            "clip_qkv": None,
            "qk_ln": False,
            "prefix_lm": False,
        },
    },
    left_out={"tie_word_embeddings": True},
)
FAMILIES = (LLAMA, MISTRAL, QWEN3, STARCODER2, GPT2, MPT)

#: Tensors of old checkpoints that are no weights.
BUFFERS = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")


def flat(config: Config) -> Keys:
    """The keys of a config that determine its model."""
    groups = ("attn", "pos", "model")
    keys = {f"{g}.{key}": x for g in groups for key, x in config[g].items() if key != "_target_"}
    return {group: config["choices"][group] for group in groups} | keys


def plain(keys: Keys) -> str:
    """Keys as overrides: attn=gqa pos.base=10000 model.bias=false."""
    return " ".join(
        f"{key}={x if isinstance(x, str) else json.dumps(x)}" for key, x in keys.items()
    )


def home_of(config: Config) -> Family:
    """The family that computes what a config does.

    Raises ValueError if there is none, with the keys that each of them has no place for.
    """
    mine = flat(config)
    for key in ("model.latents", "model.bottleneck"):
        if mine[key] is not None:
            raise ValueError(f"no model of transformers computes the same: none has {key}")
    if mine["model.ff_dim"] == 4 * mine["model.dim"]:
        mine["model.ff_dim"] = None
    refusals = []
    for family in FAMILIES:
        fits = {key: mine.get(key, fit[0]) in fit for key, fit in family.fits.items()}
        if all(fits.values()):
            return family
        wrong = plain({key: mine[key] for key, fit in fits.items() if not fit})
        refusals.append(f"{family.architecture} has no {wrong}")
    raise ValueError(f"no model of transformers computes the same: {'; '.join(refusals)}")


def differences(one: Config, other: Config) -> tuple[str, str]:
    """The keys, sizes apart, in which two models differ, with the values of each."""
    mine, theirs = flat(one), flat(other)
    sizes = {key for key in mine if key.startswith("model")} - {"model.feedforward", "model.norm"}
    keys = [key for key in mine if key not in sizes and mine[key] != theirs.get(key, mine[key])]
    return plain({key: mine[key] for key in keys}), plain({key: theirs[key] for key in keys})


def their_config(family: Family, model: Transformer, config: Config) -> dict[str, Any]:
    """The config.json of a model, but for its special tokens."""
    shape, attention = model.shape, cast(GQA, model.attention_layers[0])
    own = vars(shape) | {
        "n_kv_heads": attention.n_kv_heads,
        "window": getattr(attention, "window", None),
    }
    own["head_dim"] = shape.head_dim
    own["ff_dim"] = model.get_submodule("blocks.0.feedforward.out").in_features
    theirs = {ours: name for name, ours in reversed(family.feedforwards.items())}
    own["feedforward"] = theirs.get(config["model"]["feedforward"])
    content = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": "float32",
        **{theirs: own[ours] for ours, theirs in family.keys.items()},
        **family.fixed,
        **dict.fromkeys(family.biases, shape.bias),
        **dict.fromkeys(family.dropouts, shape.dropout),
    }
    if isinstance(model.position, RoPE):
        name = config["choices"]["pos"]
        content["rope_parameters"] = their_rope(name, model.position, shape.head_dim)
    return content


def their_rope(name: str, position: RoPE, width: int) -> dict[str, Any]:
    """The RoPE parameters in their config, for heads of this width."""
    base = position.base
    if isinstance(position, NTKRoPE):  # nothing but another base
        name, base = "rope", base * position.factor ** (width / (width - 2))
    kind, keys = SCALINGS[name]
    scaling = {theirs: getattr(position, ours) for ours, theirs in keys.items()}
    return {"rope_type": kind, "rope_theta": base, **scaling}


def their_weights(family: Family, model: Transformer) -> dict[str, Tensor]:
    """A model's parameters by their names, in float32 and the shapes that they have there."""
    weights = {name: p.detach().float() for name, p in model.named_parameters()}
    if "position.table" in family.names:
        weights["position.table.weight"] = table_of(model, model.shape.max_len)
    for name, x in list(weights.items()):
        inner = name.startswith(("blocks.", "norm.")) and name.endswith("weight")
        if inner and x.dim() in family.always_biased:
            weights.setdefault(name.removesuffix("weight") + "bias", torch.zeros(len(x)))
    if "blocks.{}.attention.qkv" in family.names:
        weights = joined(weights, model.shape.head_dim)
    if family.transposed:
        weights = turned(weights)
    return {name: x.contiguous() for name, x in renamed(weights, family.names).items()}


def our_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a folder by our names, in float32.

    Raises ValueError for files that are missing or damaged, and for tensors of another model.
    """
    family, theirs = open_theirs(folder)
    within = family.names["embed"].partition(".")[0] + "."  # which bare models leave out
    tensors = {
        name if name.startswith((within, "lm_head.")) else within + name: x.float()
        for name, x in tensors_in(folder).items()
        if not BUFFERS.search(f".{name}")
    }
    names = {theirs: ours for ours, theirs in family.names.items()}
    weights = renamed(tensors, names, f"{folder}: ")
    weights = parted(turned(weights) if family.transposed else weights)
    tied = theirs["tie_word_embeddings"] and "head.weight" in weights
    if tied and torch.equal(weights["head.weight"], weights["embed.weight"]):
        del weights["head.weight"]
    return weights


def joined(weights: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    """Weights with q, k and v of each attention fused, keys and values repeated to all heads."""
    weights = dict(weights)
    for name in [name for name in weights if ".attention.q." in name]:
        parts = [weights.pop(name.replace(".q.", f".{part}.")) for part in "qkv"]
        heads = [part.unflatten(0, (-1, head_dim)) for part in parts]  # (heads, Dh, ...)
        full = [x.repeat_interleave(len(heads[0]) // len(x), dim=0) for x in heads]
        weights[name.replace(".q.", ".qkv.")] = torch.cat(full).flatten(0, 1)
    return weights


def parted(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the fused q, k and v of each attention split."""
    weights = dict(weights)
    for name in [name for name in weights if ".attention.qkv." in name]:
        for part, x in zip("qkv", weights.pop(name).tensor_split(3), strict=True):
            weights[name.replace(".qkv.", f".{part}.")] = x
    return weights


def turned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the matrices of all blocks transposed."""
    inner = {name for name, x in weights.items() if name.startswith("blocks.") and x.dim() == 2}
    return {name: x.T if name in inner else x for name, x in weights.items()}


def renamed(
    weights: dict[str, Tensor], names: dict[str, str], where: str = ""
) -> dict[str, Tensor]:
    """Weights with their modules renamed. Raises ValueError for an unknown module."""
    found = {}
    for name, x in weights.items():
        module, _, kind = name.rpartition(".")
        layer = re.search(r"\.(\d+)\.", module)
        general = re.sub(r"\.\d+\.", ".{}.", module, count=1)
        if general not in names:
            raise ValueError(f"{where}{name} is no tensor of a model that we know")
        found[f"{names[general].format(layer[1] if layer else '')}.{kind}"] = x
    return found


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, as they are. Raises ValueError for a damaged file."""
    tensors: dict[str, Tensor] = {}
    for file in files_of(folder):
        tensors |= load_tensors(file)
    return tensors


def files_of(folder: Path) -> list[Path]:
    """The safetensors of a folder, one file or several.

    Raises ValueError unless all are there, with a tokenizer.json.
    """
    index, names = folder / "model.safetensors.index.json", ["model.safetensors"]
    if index.is_file() and not (folder / names[0]).is_file():
        parts = dict(read_json(index).get("weight_map") or {})
        names = sorted({Path(str(name)).name for name in parts.values()})
    pickled = [path.name for path in folder.glob("pytorch_model*.bin")]
    if pickled and not any((folder / name).is_file() for name in names):
        raise ValueError(
            f"{folder}: {pickled[0]} could run code and is not opened; save safetensors"
        )
    for name in (*names, "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}")
    return [folder / name for name in names]


def open_theirs(folder: Path) -> tuple[Family, Keys]:
    """The family of a folder, and its config with what was left out.

    Raises ValueError for other families, and for values that make it compute something else.
    """
    theirs = read_json(folder / "config.json")
    family = next((f for f in FAMILIES if f.model_type == theirs["model_type"]), None)
    if family is None:
        known = ", ".join(family.model_type for family in FAMILIES)
        raise ValueError(f"{folder}: model_type={theirs['model_type']} is not one of {known}")
    for key in family.keys.values():
        if theirs.get(key) is None and key not in family.left_out:
            raise ValueError(f"{folder}: config.json has no {key}")
    theirs = family.left_out | theirs
    check_fixed(family.fixed, theirs, f"{folder}: ")
    return family, theirs


def check_fixed(fixed: Keys, theirs: Keys, where: str) -> None:
    """Raise ValueError for a key whose value is not the only one supported."""
    for key, value in fixed.items():
        other = theirs.get(key, value)
        if isinstance(value, dict) and isinstance(other, dict):
            check_fixed(value, other, f"{where}{key}.")
        elif other != value:
            raise ValueError(f"{where}{plain({key: other})}; ours would be {plain({key: value})}")


def overrides_of(folder: Path) -> list[str]:
    """The overrides of train.py that make the model of a folder. Raises ValueError if none do."""
    family, theirs = open_theirs(folder)
    try:
        return plain(our_keys(family, theirs)).split()
    except (TypeError, ValueError) as error:  # a value may be anything
        raise ValueError(f"{folder}: {error}") from error


def our_keys(family: Family, theirs: Keys) -> Keys:
    """Their config in our keys. Raises ValueError for a value that ours do not support."""
    own = {ours: theirs[key] for ours, key in family.keys.items()}
    recipe = {key: fit[0] for key, fit in family.fits.items()}
    name = own.pop("feedforward", None)
    if name is not None and name not in family.feedforwards:
        known = ", ".join(family.feedforwards)
        raise ValueError(f"{family.keys['feedforward']}={name} is not one of {known}")
    own = {key: numeric(family.keys[key], x) for key, x in own.items()}
    own.pop("head_dim", None)  # ours follows from the sizes
    heads, head_dim = own["n_heads"], theirs.get("head_dim")
    if head_dim is not None and head_dim * heads != own["dim"]:
        raise ValueError(f"head_dim={head_dim}: ours would be {own['dim']} / {heads}")
    kv_heads, window = own.pop("n_kv_heads", None), own.pop("window", None)
    attention = our_attention(heads, kv_heads, window)
    if recipe["attn.qk_norm"]:
        attention["attn.qk_norm"] = True
    own["bias"] = bool(family.always_biased) or any(theirs.get(key) for key in family.biases)
    own["feedforward"] = family.feedforwards.get(name, recipe["model.feedforward"])
    own["norm"] = recipe["model.norm"]
    preset = "llama" if own["norm"] == "rmsnorm" else "gpt2"
    position = our_rope(theirs) if recipe["pos"] == "rope" else {"pos": recipe["pos"]}
    return {"model": preset, **{f"model.{k}": x for k, x in own.items()}, **attention, **position}


def our_attention(heads: int, kv_heads: int | None, window: int | None) -> Keys:
    """Attention of these sizes in our keys."""
    kv_heads = heads if kv_heads is None else kv_heads
    if window is not None:
        return {"attn": "sliding", "attn.window": window, "attn.n_kv_heads": kv_heads}
    if kv_heads in (1, heads):
        return {"attn": "mha" if kv_heads == heads else "mqa"}
    return {"attn": "gqa", "attn.n_kv_heads": kv_heads}


def our_rope(theirs: Keys) -> Keys:
    """Rotary positions in our keys, from a config of transformers 5 or an older one.

    Raises ValueError for a scaling that ours do not have.
    """
    rope = dict(theirs.get("rope_scaling") or theirs.get("rope_parameters") or {})
    older = rope.pop("type", None)
    kind = rope.pop("rope_type", older) or "default"
    names = {kind: name for name, (kind, _) in SCALINGS.items()}
    if kind not in names:
        raise ValueError(f"rope_type={kind} is not one of {', '.join(names)}")
    length = theirs.get("original_max_position_embeddings") or theirs["max_position_embeddings"]
    left_out = {"original_max_position_embeddings": length, "beta_fast": 32, "beta_slow": 1}
    found = {"base": rope.pop("rope_theta", None) or theirs.get("rope_theta") or 10000}
    for ours, key in SCALINGS[names[kind]][1].items():
        found[ours] = rope.pop(key, None) or left_out.get(key)
    check_rest({"partial_rotary_factor": theirs.get("partial_rotary_factor")} | rope, found)
    return {"pos": names[kind]} | {f"pos.{key}": numeric(key, x) for key, x in found.items()}


def check_rest(rest: Keys, found: Keys) -> None:
    """Raise ValueError for unsupported RoPE parameters, unless they change nothing."""
    usual = {"partial_rotary_factor": 1.0, "truncate": True}
    usual["attention_factor"] = 0.1 * math.log(found.get("factor") or 1) + 1
    for key, value in rest.items():
        if value not in (None, usual.get(key)):
            raise ValueError(f"{key}={value} is an unsupported RoPE parameter")


def numeric(key: str, value: Any) -> Any:
    """A number, true, false or null. Raises ValueError for anything else."""
    if value is None or isinstance(value, (int, float)):
        return int(value) if isinstance(value, float) and value.is_integer() else value
    raise ValueError(f"{key}={value} is not a number")
