"""Parameters, FLOPs and kernels of a model."""

import torch
from torch import nn

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
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    scores = 0.0
    for i, layer in enumerate(model.attention_layers):
        products = 1 + layer.score_backward(model.position.of_layer(i).trains_bias)
        scores += products * layer.score_flops(length, causal)
    return sum((6 if w.requires_grad else 4) * w.numel() for w in weights) + scores


def training_kernels(model: Transformer, device: str, dtype: torch.dtype, length: int) -> list[str]:
    """The attention kernel of each layer in training at this length.

    Raises ValueError where a kernel that was asked for cannot do it.
    """
    biased = ["bias" in model.position.of_layer(i).hooks for i in range(model.shape.n_layers)]
    layers = zip(model.attention_layers, biased, strict=True)
    return [layer.kernel(device, dtype, length, bias) for layer, bias in layers]
