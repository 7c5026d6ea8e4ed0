"""Normalisation over the channels of a token.

On CUDA autocast would copy the input and return float32, which every product that follows casts back.
The kernels take bfloat16 and compute their sums in float32, so here they get it.
"""

from contextlib import AbstractContextManager, nullcontext

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
        if x.device.type == "cpu":  # whose autocast leaves it alone
            return F.layer_norm(x, self.weight.shape, self.weight, self.bias)
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        with as_given(x):
            return F.layer_norm(x, weight.shape, weight, bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, eps 1e-5; it has no bias (Zhang & Sennrich 2019)."""

    def __init__(self, dim: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        with as_given(x):
            return rms_norm(x, self.weight, 1e-5)


def as_given(x: Tensor) -> AbstractContextManager[object]:
    """Context in which operations take x in the dtype that it has."""
    device = x.device.type
    if device == "cpu" or not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
