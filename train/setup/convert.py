"""Conversion of the weights of one variant to those of another."""

import re

import torch
from torch import Tensor

from model.attention.base import Attention
from model.transformer import Transformer


def fit_to_shape(weights: dict[str, Tensor], model: Transformer, how: str) -> dict[str, Tensor]:
    """Weights by name, converted to the shapes of a model where a conversion is known.

    Keys and values of fewer heads are made from groups of neighbours, those that one of the new heads
    will serve: their `mean` (Ainslie et al. 2023, section 2.1), the `first` of each, or the model's
    own `random` start. A position table that ends keeps the rows that exist in both. Biases that one
    side does not have are zeros. What finetuning adds keeps the model's own start.
    """
    own = dict(model.named_parameters())
    adapted = {
        name: x for name, x in weights.items() if name in own or not needless(name, x, model)
    }
    for name, mine in own.items():
        theirs = weights.get(name)
        if theirs is None and name.endswith("bias"):
            adapted[name] = torch.zeros_like(mine)
        if theirs is None or theirs.shape == mine.shape or theirs.shape[1:] != mine.shape[1:]:
            continue
        if name.startswith("position.") and model.position.max_len is not None:
            rows = min(len(mine), len(theirs))
            adapted[name] = mine.detach().clone()
            adapted[name][:rows] = theirs[:rows]
        elif re.search(r"\.attention\.[kv]\.(weight|bias)$", name) and len(theirs) > len(mine):
            layer = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
            assert isinstance(layer, Attention)
            head_dim = len(mine) // (layer.n_kv_heads or layer.n_heads)  # of keys, or of values
            if len(theirs) % len(mine) == 0:
                groups = theirs.unflatten(0, (len(mine) // head_dim, -1, head_dim))
                mean = groups.double().mean(1).to(groups.dtype)  # equal heads are kept exactly
                pooled = {"mean": mean.flatten(0, 1), "first": groups[:, 0].flatten(0, 1)}
                adapted[name] = pooled.get(how, mine.detach())
    return {name: own[name].detach() for name in model.added} | adapted


def needless(name: str, weight: Tensor, model: Transformer) -> bool:
    """True if a model without this weight computes the same: zero biases, or computed positions."""
    if weight.is_meta:
        return False
    if name == "position.table.weight":
        return torch.equal(weight, table_of(model, len(weight)))
    return name.endswith("bias") and not weight.any()


@torch.no_grad()
def table_of(model: Transformer, rows: int) -> Tensor:
    """The vectors that a position scheme adds to the embeddings of the first tokens: (rows, D)."""
    weight = model.embed.weight
    nothing = torch.zeros(1, rows, weight.size(1), device=weight.device)
    return model.position.embed(nothing, torch.arange(rows, device=weight.device))[0]
