"""Normalisation over the channels of a token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.ops.rms_norm import rms_norm


class LayerNorm(nn.Module):
    """(x - mean) / std * weight [+ bias], eps 1e-5 (Ba et al. 2016)."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, eps 1e-5; it has no bias (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, 1e-5)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
