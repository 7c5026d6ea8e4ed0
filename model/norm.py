"""Normalisation over the channels of a token."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EPS = 1e-5


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
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return rms_norm(x, self.weight.to(x.dtype))
        return F.rms_norm(x.float(), self.weight.shape, self.weight, eps=EPS).to(x.dtype)


class RootMeanSquare(torch.autograd.Function):
    """F.rms_norm, which a CPU has as a dozen float32 operations, in three; the sums stay float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.size(-1) + EPS).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return x * scale.to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, scale = ctx.saved_tensors
        rows = (grad * x).reshape(-1, x.size(-1))
        along = torch.mv(rows, weight).view(scale.shape).float() * scale.pow(3) / x.size(-1)
        scale = scale.to(x.dtype)
        grad_x = torch.addcmul(grad * weight * scale, x, along.to(x.dtype), value=-1)
        return grad_x, torch.mv(rows.mT, scale.flatten())


rms_norm = cast(Callable[[Tensor, Tensor], Tensor], RootMeanSquare.apply)
NORMS = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}
