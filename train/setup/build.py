"""Objects from config nodes: the only place that turns a name in a config into code."""

import importlib
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode

from data.corpus import Corpus, Source, prepare
from data.objective.base import Objective, check_sampling
from model.attention.base import Attention
from model.cost import count_parameters
from model.feedforward import FEEDFORWARDS
from model.init import init_weights
from model.ops.norm import NORMS
from model.perceiver import kind_of
from model.position.base import Position
from model.position.pattern import Pattern
from model.shape import Shape
from model.transformer import Transformer
from model.tuning.base import Tuning
from train.config.schema import Config, arguments, choose
from train.optim.optimizer import Optimizer
from train.optim.schedule import Schedule

PACKAGES = {
    "attn": "model.attention",
    "pos": "model.position",
    "tune": "model.tuning",
    "data": "data",
    "objective": "data.objective",
    "optim": "train.optim",
}
LARGE = 10**8  # parameters: 400 MB
SCALED_INIT = {"all": "out.weight", "feedforward": "feedforward.out.weight"}


def target(group: str, node: Config, where: str) -> type:
    """The class that the `_target_` of a node names; the node is called `where` in errors.

    Configs are rebuilt from runs that people share, so only a class that is defined in a module of
    its group's package counts, or in one of its folders: `model.attention.grouped.GQA`, but not what
    such a module imported.
    Raises ValueError for anything else.
    """
    path = str(node.get("_target_"))
    module = rf"{re.escape(PACKAGES[group])}(?:\.[a-z0-9_]+){{1,2}}"
    match = re.fullmatch(rf"({module})\.([A-Za-z0-9]+)", path)
    if match:
        try:
            found = getattr(importlib.import_module(match[1]), match[2], None)
        except ModuleNotFoundError:
            found = None
        if isinstance(found, type) and found.__module__ == match[1]:
            return found
    raise ValueError(f"{where}._target_={path} is no class defined in {PACKAGES[group]}")


def build_model(config: Config, vocab_size: int) -> Transformer:
    """The model of a config, uninitialised, on torch's default device.

    `model.vocab_size` may leave room beyond the tokenizer's `vocab_size`.
    Raises ValueError if the parts do not fit each other.
    """
    node, choices = dict(config["model"]), config["choices"]
    if node.get("vocab_size") is None:
        node["vocab_size"] = vocab_size
    sizes, names = arguments("model", node, Shape, parts)
    if sizes["vocab_size"] < vocab_size:
        raise ValueError(
            f"model.vocab_size={sizes['vocab_size']} is smaller than the tokenizer's {vocab_size}; "
            "null takes the tokenizer's"
        )
    feedforward, norm, _ = parts(**names)
    attention, position = attention_of_layers(config["attn"]), position_of_layers(config["pos"])
    try:
        with Uninitialised():
            shape = Shape(**sizes)
            model = kind_of(shape)(
                shape,
                attention=attention,
                position=position,
                feedforward=feedforward,
                norm=norm,
            )
    except ValueError as error:
        variant = f"model={choices['model']} attn={choices['attn']} pos={choices['pos']}"
        raise type(error)(f"{variant}: {error}") from error
    plain = {name for name, _ in model.named_parameters()}
    build_tuning(config).apply(model)
    model.added = frozenset(name for name, _ in model.named_parameters() if name not in plain)
    model.activation_checkpointing = config["memory"] == "lean"
    for layer in model.attention_layers:
        layer.asked_kernel = config["kernel"]
    return model


def build_tuning(config: Config) -> Tuning:
    """What a config trains of its model, and adds to it."""
    return cast(Tuning, factory("tune", config["tune"])())


@torch.no_grad()
def try_model(config: Config) -> None:
    """Raise ValueError if the parts of a model cannot work together: send a token through them.

    Through one layer of each kind, uninitialised. Where even those would take much memory it is on
    the meta device, which has torch import its compiler, for a second.
    """
    kinds = math.lcm(*(len(config[group].get("pattern", [0])) for group in ("attn", "pos")))
    if config["model"]["bottleneck"] is not None:
        kinds = max(2, kinds)
    few = {"n_layers": min(kinds, config["model"]["n_layers"]), "vocab_size": 1}
    config = config | {"model": config["model"] | few}
    with torch.device("meta"):
        total, _ = count_parameters(build_model(config, 1))
    with torch.device("meta" if total > LARGE else "cpu"):
        build_model(config, 1)(torch.zeros(1, 1, dtype=torch.int64))


class Uninitialised(TorchFunctionMode):
    """Context in which torch's layers skip their own initialisation: `init_model` does it.

    On the meta device torch's own would also import its compiler.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def init_model(model: Transformer, config: Config, seed: int) -> None:
    """Initialise the parameters of a model by its config."""
    _, names = arguments("model", config["model"] | {"vocab_size": 1}, Shape, parts)
    init_weights(model, seed, scaled=parts(**names)[2])


def parts(
    *, feedforward: str, norm: str, scaled_init: str
) -> tuple[Callable[..., torch.nn.Module], type, str]:
    """The feed-forward, the norm and the name ending of scaled matrices that a config names."""
    return (
        choose("model.feedforward", feedforward, FEEDFORWARDS),
        choose("model.norm", norm, NORMS),
        choose("model.scaled_init", scaled_init, SCALED_INIT),
    )


def attention_of_layers(node: Config) -> Callable[[Shape, int], Attention]:
    """The attention of each layer: one for all, or those of a pattern in turn."""
    if "pattern" not in node:
        return factory("attn", node)
    parts, pattern = parts_of_pattern("attn", node)
    return lambda shape, layer: parts[pattern[layer % len(pattern)]](shape, layer)


def position_of_layers(node: Config) -> Callable[[Shape], Position]:
    """The position scheme: one for all layers, or a pattern of schemes."""
    if "pattern" not in node:
        return factory("pos", node)
    parts, pattern = parts_of_pattern("pos", node)
    return partial(Pattern, schemes=parts, pattern=pattern)


def parts_of_pattern(group: str, node: Config) -> tuple[dict[str, Callable[..., Any]], list[str]]:
    """The named parts of a pattern of layers, and the order of their names, which repeats.

    Raises ValueError for a pattern that is empty, names others, or leaves one out.
    """
    parts = {
        key: factory(group, part, where=f"{group}.{key}")
        for key, part in node.items()
        if isinstance(part, dict)
    }
    rest = {key: value for key, value in node.items() if key not in parts}
    pattern = arguments(group, rest, pattern_keys)[0]["pattern"]
    for name in pattern:
        choose(f"{group}.pattern", name, parts)
    if unused := sorted(parts.keys() - set(pattern)):
        raise ValueError(f"{group}.pattern=[{','.join(pattern)}] leaves out {', '.join(unused)}")
    return parts, pattern


def pattern_keys(*, pattern: list[str]) -> None:
    """The keys of a pattern, beside its parts."""


def factory(group: str, node: Config, where: str = "") -> Callable[..., Any]:
    """A factory of the class that a group's node names, with the keys of the node filled in."""
    part = target(group, node, where or group)
    return partial(part, **arguments(where or group, node, part)[0])


def build_source(data: Config) -> tuple[Source, dict[str, Any]]:
    """The text source of a `data` node, and the arguments of `prepare`."""
    kind = target("data", data, "data")
    source, corpus, order = arguments("data", data, kind, prepare, check_sampling, given={"say"})
    check_sampling(**order)
    return kind(**source), corpus


def objective_of(config: Config) -> tuple[type[Objective], dict[str, Any]]:
    """The class of a config's objective and its own keys, checked as far as no text is needed."""
    node = config["objective"]
    kind: type[Objective] = target("objective", node, "objective")
    (own,) = arguments("objective", node, kind)
    kind.check(own, config["data"]["tokenizer"])
    latents = config["model"]["latents"]
    if kind.partial and latents is not None:
        raise ValueError(
            f"model.latents={latents} predicts the end of a row, which objective="
            f"{config['choices']['objective']} does not learn; objective=next works"
        )
    return kind, own


def build_objective(config: Config, corpus: Corpus) -> Objective:
    """What a config's model learns to predict in a corpus. Raises ValueError for what does not fit."""
    kind, own = objective_of(config)
    return kind(
        corpus,
        rows=config["batch_size"],
        length=config["model"]["max_len"],
        seed=config["seed"],
        sampling=config["data"]["sampling"],
        **own,
    )


def build_optimizer(
    config: Config, model: torch.nn.Module, steps: int
) -> tuple[Optimizer, Schedule]:
    """A config's optimizer over a model, and the schedule of its learning rate."""
    kind = target("optim", config["optim"], "optim")
    own, rate, trainer = arguments(
        "optim", config["optim"], kind, Schedule, clipping, given={"steps"}
    )
    clipping(**trainer)
    try:
        schedule = Schedule(steps=steps, **rate)
        return kind(model, **own), schedule
    except ValueError as error:
        raise ValueError(f"optim.{error}") from error


def clipping(*, clip: float | None) -> float:
    """The largest gradient norm to allow; infinite for None. Raises ValueError unless positive."""
    if clip is not None and clip <= 0:
        raise ValueError(f"optim.clip={clip} must be above 0, or null for no clipping")
    return float("inf") if clip is None else clip
