"""Dropout that does not dominate a small model's step on a CPU."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p and scale the rest so that the mean stays."""
    if not training or p == 0:
        return x
    x, scale = drop(x, p)
    return x if scale == 1 else x * scale


def drop(x: Tensor, p: float) -> tuple[Tensor, float]:
    """Zero each element with probability p; and the scale that keeps the mean, left to the caller.

    So a factor of a product can be scaled in place of the product. On a CPU, one random byte
    decides an element: p is rounded to 256ths, 1/256 at least (0.1 becomes 26/256), and the scale is
    exact for the rounded p. Elsewhere, and under torch.compile, this is F.dropout, with scale 1.
    Draws from torch's global generator, which the trainer seeds with (seed, step).
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p), 1.0
    dropped = min(max(round(p * 256), 1), 255)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
    words.random_(-(2**63), None)  # the whole range: plain random_() never sets the sign bit
    kept = words.view(torch.uint8)[: x.numel()].view(x.shape).ge_(dropped)
    return kept_of(x, kept), 256 / (256 - dropped)


class Keep(torch.autograd.Function):
    """x where `kept` (uint8) is 1, and 0 where it is 0. Autograd's product would keep x, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return keep(x, kept)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return keep(grad, kept), None


kept_of = cast(Callable[[Tensor, Tensor], Tensor], Keep.apply)


def keep(x: Tensor, kept: Tensor) -> Tensor:
    """x * kept, bit pattern times 0 or 1: on a CPU, integers multiply twice as fast as bfloat16.

    The factor's memory takes the product: writing to memory of its own takes as long as multiplying.
    """
    bits = INTEGERS[x.element_size()]
    return kept.to(bits).mul_(x.view(bits)).view(x.dtype)
