"""Rotary positions."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from model.position.base import Position
from model.shape import Shape

IN_CACHE = 2**19  # numbers, of which a core's cache holds a few copies


class RoPE(Position):
    """Rotates each pair (x_i, x_{i + w/2}) of q and k by p * base^(-2i/w), w = fraction * Dh.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout of Llama checkpoints
    (the paper interleaves the pairs; the two differ by a permutation of channels). The score of
    query i and key j then depends on i - j alone. With a `fraction` below 1 the first w channels of
    a head are turned and the others carry no position (GPT-NeoX). Angles are float32 whatever the
    model's dtype, their cosines and sines rounded to it; they follow from the width of q, so that a
    mechanism may rotate a slice.
    Raises ValueError for a width that holds no whole number of pairs.
    """

    #: Factor on the turned channels of q and of k.
    amplitude = 1.0

    def __init__(self, shape: Shape, *, base: float, fraction: float) -> None:
        super().__init__(shape)
        if shape.head_dim % 2:
            raise ValueError(
                f"RoPE turns pairs of channels and needs an even head_dim, not "
                f"dim={shape.dim} / n_heads={shape.n_heads} = {shape.head_dim}"
            )
        if not base > 1:
            raise ValueError(f"base={base} must be above 1")
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction={fraction} must be above 0, and at most 1")
        self.base = base
        self.fraction = fraction
        self.computed: tuple[Tensor | None, tuple[Tensor, ...]] = None, ()
        self.turned(shape.head_dim)

    def rotate(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.waves(q, pos)
        return turn(q, cos, sin), turn(k, cos, sin)

    def waves(self, x: Tensor, pos: Tensor) -> tuple[Tensor, ...]:
        """cos and sin (T, 2 n) of each turned channel, in the dtype of x.

        All layers of a forward pass share `pos`, and what the first one computes of it.
        """
        given, waves = self.computed
        width = self.turned(x.size(-1))
        known = given is pos and waves[0].size(-1) == width and waves[0].dtype == x.dtype
        if not known or torch.compiler.is_compiling():
            angles = self.angles(width, pos)
            cos, sin = self.amplitude * angles.cos(), self.amplitude * angles.sin()
            both = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            waves = both[0].to(x.dtype), both[1].to(x.dtype)
            if not torch.compiler.is_compiling():
                self.computed = pos, waves
        return waves

    def angles(self, width: int, pos: Tensor) -> Tensor:
        """Angle of each pair, in radians: pos (T,) -> (T, width / 2)."""
        return pos[:, None].float() * self.frequencies(width, pos.device)

    def frequencies(self, width: int, device: torch.device) -> Tensor:
        """Radians that each pair turns per token, float32: (width / 2,)."""
        return geometric(self.base, width, device)

    def turned(self, width: int) -> int:
        """How many of a head's channels are turned."""
        exact = self.fraction * width
        turned = round(exact)
        if turned % 2 or turned < 2 or abs(turned - exact) > 1e-6:
            raise ValueError(
                f"fraction={self.fraction} of {width} channels is {exact:g}, not an even number"
            )
        return turned


def at_least_one(factor: float) -> float:
    """The factor of a longer context. Raises ValueError below 1."""
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1")
    return factor


def geometric(base: float, width: int, device: torch.device) -> Tensor:
    """base^(-2i/width) for each pair i, float32: (width / 2,)."""
    even = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    return base ** (-even / width)


class Turn(torch.autograd.Function):
    """x * cos + swapped(x) * sin in few passes over memory, and back by the opposite angle.

    Autograd's own way through the formula writes and keeps several times as much. What is returned
    lies as attention takes its heads, and its gradient as a projection does: no other copy follows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turn_into(x.new_empty(x.shape), x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        B, H, T, Dh = gradient.shape
        out = gradient.new_empty(B, T, H, Dh).transpose(1, 2)
        return turn_into(out, gradient, cos, -sin), None, None


turn = cast(Callable[[Tensor, Tensor, Tensor], Tensor], Turn.apply)


def turn_into(out: Tensor, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Write x into `out`, its first channels turned, as many as cos and sin (T, 2 n) have.

    On a CPU it goes by so many rows as stay in the cache.
    """
    cached = x.device.type == "cpu" and not torch.compiler.is_compiling()
    rows = max(1, IN_CACHE // x[0].numel()) if cached else len(x)
    for part, turned in zip(x.split(rows), out.split(rows), strict=True):
        turned.copy_(part)
        turned = turned[..., : cos.size(-1)]
        swapped = turned.roll(cos.size(-1) // 2, dims=-1)
        turned.mul_(cos).addcmul_(swapped, sin)
    return out
