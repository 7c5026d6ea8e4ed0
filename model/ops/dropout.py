"""Dropout by random bytes: on a CPU, F.dropout is the slowest operation of a small model's step."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """F.dropout: zero each element with probability p, and scale the rest to keep the mean."""
    if not training or p == 0:
        return x
    x, scale = drop(x, p)
    return x if scale == 1 else x * scale


def drop(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Zero each element with probability p; returns the scale that keeps the mean, to be applied.

    The caller may scale a smaller factor of a product instead. On a CPU, one random byte decides
    each element: p is rounded to 256ths, 1/256 at least (0.1 becomes 26/256), and the scale is exact
    for the rounded p. Elsewhere, and under torch.compile, this is F.dropout, with scale 1. Draws
    from torch's global generator, which the trainer seeds with (seed, step).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p), 1.0
    dropped = min(max(round(p * 256), 1), 255)
    return apply_mask(x, random_mask(x.shape, dropped)), 256 / (256 - dropped)


def random_mask(shape: torch.Size, dropped: int) -> Tensor:
    """uint8 of this shape: 0 with probability dropped / 256, else 1."""
    size = shape.numel()
    words = torch.empty((size + 7) // 8, dtype=torch.int64)
    words.random_(-(2**63), None)  # the whole range: plain random_() never sets the sign bit
    return words.view(torch.uint8)[:size].view(shape).ge_(dropped)


def apply_mask_reference(x: Tensor, mask: Tensor) -> Tensor:
    """x where the mask is 1, else 0."""
    return torch.where(mask.bool(), x, 0)


class DropoutMask(torch.autograd.Function):
    """`apply_mask_reference` as x * mask (uint8), saving the mask alone: autograd would save x too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return masked(x, mask)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return masked(grad, mask), None


apply_mask = cast(Callable[[Tensor, Tensor], Tensor], DropoutMask.apply)


def masked(x: Tensor, mask: Tensor) -> Tensor:
    """x * mask on bit patterns: on a CPU, integers multiply twice as fast as bfloat16."""
    bits = INTEGERS[x.element_size()]
    # In place: a new output would cost as much as the multiplication.
    return mask.to(bits).mul_(x.view(bits)).view(x.dtype)
