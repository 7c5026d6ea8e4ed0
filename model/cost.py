"""Parameters, FLOPs and kernels of a model."""

import torch
from torch import nn

from model.attention.base import Attention
from model.transformer import Transformer


def count_parameters(model: Transformer) -> tuple[int, int]:
    """(all parameters, those outside token and position tables and a tied head)."""
    total = sum(p.numel() for p in model.parameters())
    tables = model.embed.weight.numel() + sum(p.numel() for p in model.position.parameters())
    return total, total - tables


def flops_per_token(model: Transformer, length: int, *, causal: bool = True) -> float:
    """FLOPs of training on one token of a sequence of this length, forward and backward.

    2 per weight of a matrix product plus the scores of each attention layer, times 3: the backward
    pass has two products for each one of the forward, but where a layer says otherwise; a weight that
    is not trained has one. Embedding look-ups and elementwise operations are not counted; causal
    scores count half of the full square, and what a prompt or a prefix adds to a text not at all.
    """
    rows = [model.rows(layer, length) for layer in range(model.shape.n_layers)]
    total = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.startswith("prompt."):
            products = 6 if module.weight.requires_grad else 4
            total += products * module.weight.numel() * rows_through(name, rows)
    for i, layer in enumerate(model.attention_layers):
        products = 1 + layer.score_backward(model.position.of_layer(i).trains_bias)
        total += products * scores_of_row(layer, *rows[i], causal)
    return total / length


def rows_through(module: str, rows: list[tuple[int, int]]) -> int:
    """Rows of a text that a linear module is multiplied with, by the queries and keys of each layer."""
    parts = module.split(".")
    if parts[0] != "blocks":
        return rows[-1][0]
    queries, keys = rows[int(parts[1])]
    return keys if parts[2:4] in (["attention", "k"], ["attention", "v"]) else queries


def scores_of_row(layer: Attention, queries: int, keys: int, causal: bool) -> float:
    """Forward FLOPs of the scores and weighted values of one text."""
    if queries == keys:
        return queries * layer.score_flops(keys, causal)
    few, many = sorted((queries, keys))
    visible = few * (many - few / 2) if causal else few * many
    return layer.score_flops(1, causal=False) * visible


def training_kernels(model: Transformer, device: str, dtype: torch.dtype, length: int) -> list[str]:
    """The attention kernel of each layer in training at this length.

    Raises ValueError where a kernel that was asked for cannot do it.
    """
    kernels = []
    for i, layer in enumerate(model.attention_layers):
        queries, keys = model.rows(i, length)
        masked = queries != keys or layer.prefix is not None  # not by the triangle alone
        biased = masked or "bias" in model.position.of_layer(i).hooks
        kernels.append(layer.kernel(device, dtype, keys, biased))
    return kernels
