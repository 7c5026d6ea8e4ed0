"""Rotary positions."""

import torch
from torch import Tensor

from model.position.base import Position
from model.shape import Shape


class RoPE(Position):
    """Rotates each pair (x_i, x_{i + w/2}) of q and k by p * base^(-2i/w), w = fraction * Dh.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout of Llama checkpoints
    (the paper interleaves the pairs; the two differ by a permutation of channels). The score of
    query i and key j then depends on i - j alone. With a `fraction` below 1 the first w channels of
    a head are turned and the others carry no position (GPT-NeoX). Angles are float32 whatever the
    model's dtype, and follow from the width of q, so that a mechanism may rotate a slice.
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
        self.turned(shape.head_dim)

    def rotate(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.angles(self.turned(q.size(-1)), pos)
        cos, sin = self.amplitude * angles.cos(), self.amplitude * angles.sin()
        return turn(q, cos, sin), turn(k, cos, sin)

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


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first n pairs of x (..., T, Dh) by angles with these cosines and sines (T, n)."""
    n = cos.size(-1)
    a, b, rest = x[..., :n], x[..., n : 2 * n], x[..., 2 * n :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1).to(x.dtype)
