"""Rotation of channel pairs, the operation of rotary positions.

Shapes: B batch, H heads, T tokens, Dh head_dim, w rotary channels, at most Dh.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

IN_CACHE = 2**19  # numbers, of which a core's cache holds a few copies


def rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first w channels of x (B, H, T, Dh) rotated in pairs (i, i + w/2); the others unchanged.

    cos and sin (T, w) hold each angle twice; sin is negative in its first half.
    """
    x, rest = x.split((cos.size(-1), x.size(-1) - cos.size(-1)), dim=-1)
    return torch.cat((x * cos + x.roll(cos.size(-1) // 2, dims=-1) * sin, rest), dim=-1)


class Rotary(torch.autograd.Function):
    """`rotary_reference` in few passes over memory; its backward rotates by the opposite angle.

    Autograd's own backward writes and keeps several times as much. The output is contiguous as
    attention reads it, and the gradient as the projection reads it: no copy follows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return rotate_into(x.new_empty(x.shape), x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        B, H, T, Dh = gradient.shape
        out = gradient.new_empty(B, T, H, Dh).transpose(1, 2)
        return rotate_into(out, gradient, cos, -sin), None, None


apply_rotary = cast(Callable[[Tensor, Tensor, Tensor], Tensor], Rotary.apply)


def rotate_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Write rotated x into `out`; on a CPU a few rows at a time, so that they stay in its cache."""
    by_rows = x.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, IN_CACHE // x[0].numel()) if by_rows else len(x)
    for part, rotated in zip(x.split(rows), out.split(rows), strict=True):
        rotated.copy_(part)
        rotated = rotated[..., : cos.size(-1)]
        swapped = rotated.roll(cos.size(-1) // 2, dims=-1)
        rotated.mul_(cos).addcmul_(swapped, sin)
    return out
