"""Weights by name into a model, checked by name and shape."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor

from model.transformer import Transformer
from model.tuning.lora import LoRALinear
from train.config.schema import Config
from train.parallel.shard import part_of
from train.setup.build import build_model
from train.setup.convert import fit_to_shape


def load_weights(
    weights: dict[str, Tensor], before: Config, model: Transformer, how: str, where: str
) -> None:
    """Copy weights of a model with the config `before`. Raises ValueError for what does not fit."""
    if before["model"]["n_heads"] != model.shape.n_heads:
        raise ValueError(
            f"{where}: it has {before['model']['n_heads']} heads, model.n_heads={model.shape.n_heads} here"
        )
    load(model, fit_to_shape(weights, model, how), where)
    refuse_other_scale(before, model, where)


def refuse_other_scale(before: Config, model: Transformer, where: str) -> None:
    """Raise ValueError for low-rank parts that would count for more or less than they did."""
    tune = before.get("tune") or {}
    if "alpha" not in tune:
        return
    was = tune["alpha"] / tune["rank"]
    for module in model.modules():
        if isinstance(module, LoRALinear) and module.scale != was:
            raise ValueError(
                f"{where}: its low-rank parts count alpha / rank = {was:g} times, {module.scale:g} "
                f"times here: set tune.alpha={was * module.rank:g}"
            )


def open_model(folder: Path, config: Config, tokenizer: Tokenizer) -> Transformer:
    """The model of a run's config, uninitialised, on torch's default device.

    Raises ValueError for a config of something else.
    """
    try:
        return build_model(config, tokenizer.get_vocab_size())
    except (KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is not the config of a run: {error}") from error


def load(model: Transformer, weights: dict[str, Any], where: str) -> None:
    """Copy weights into a model by name. Raises ValueError unless names and shapes are the same."""
    check_fit(model, weights, where)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(part_of(weights[name], parameter))


def check_fit(model: Transformer, weights: dict[str, Any], where: str) -> None:
    """Raise ValueError unless weights have the names and shapes of a model's parameters."""
    mine = dict(model.named_parameters())
    for name in sorted(mine.keys() | weights.keys()):
        if name not in mine or name not in weights:
            raise ValueError(
                f"{where}: {name} is {'not of this model' if name in weights else 'missing'}"
            )
        there, here = tuple(weights[name].shape), tuple(mine[name].shape)
        if there != here:
            raise ValueError(f"{where}: {name} is {there} there, {here} here")
