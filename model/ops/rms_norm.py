"""RMSNorm in few passes over memory on a CPU."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32: (..., D)."""
    return F.rms_norm(x.float(), weight.shape, weight, eps=eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference`; on a CPU three operations of x's dtype instead of a dozen of float32."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return fused(x, weight.to(x.dtype), eps)
    if x.device.type == "cpu":
        return rms_norm_reference(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps=eps)  # its sums are float32


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm of x (..., D) by weight (D,), both of one dtype; sums over D are float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = (length.square() / x.size(-1) + eps).rsqrt()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return x * scale.to(x.dtype) * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        rows = (grad * x).reshape(-1, x.size(-1))
        along = torch.mv(rows, weight).view(scale.shape).float() * scale.pow(3) / x.size(-1)
        scale = scale.to(x.dtype)
        grad_x = torch.addcmul(grad * weight * scale, x, along.to(x.dtype), value=-1)
        return grad_x, torch.mv(rows.mT, scale.flatten()), None


fused = cast(Callable[[Tensor, Tensor, float], Tensor], RMSNormFunction.apply)
