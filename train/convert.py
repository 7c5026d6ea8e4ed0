"""Weights of one variant as the start of another."""

import re

from torch import Tensor

from model.transformer import Transformer

HOW = ("mean", "first", "random")


def adapt(weights: dict[str, Tensor], model: Transformer, how: str) -> dict[str, Tensor]:
    """Weights by name, reshaped to a model where there is a known way; all else as it is.

    Keys and values of fewer heads are made from groups of neighbours, those that one of the new heads
    will serve: their `mean` (Ainslie et al. 2023, section 2.1), the `first` of each, or the model's
    own `random` start. A position table that ends keeps the rows that exist in both.
    """
    adapted = dict(weights)
    for name, mine in model.named_parameters():
        theirs = weights.get(name)
        if theirs is None or theirs.shape == mine.shape or theirs.shape[1:] != mine.shape[1:]:
            continue
        if name.startswith("position.") and model.position.max_len is not None:
            rows = min(len(mine), len(theirs))
            adapted[name] = mine.detach().clone()
            adapted[name][:rows] = theirs[:rows]
        elif re.search(r"\.attention\.[kv]\.(weight|bias)$", name) and len(theirs) > len(mine):
            head_dim = model.shape.head_dim
            if len(theirs) % len(mine) == 0:
                groups = theirs.unflatten(0, (len(mine) // head_dim, -1, head_dim))
                pooled = {"mean": groups.mean(1).flatten(0, 1), "first": groups[:, 0].flatten(0, 1)}
                adapted[name] = pooled.get(how, mine.detach())
    return adapted
