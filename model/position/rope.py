"""Rotary positions.

Shapes: B batch, T tokens, H heads, Hkv KV heads, Dh head_dim, w rotary channels of a head.
"""

import torch
from torch import Tensor

from model.ops.rotary import apply_rotary
from model.position.base import Position, Positions
from model.shape import Shape


class RoPE(Position):
    """Rotates each pair (x_i, x_{i + w/2}) of q and k by p * base^(-2i/w), w = rotary_fraction * Dh.

    Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout of Llama checkpoints
    (the paper interleaves the pairs; the two differ by a permutation of channels). The score of
    query i and key j then depends on i - j alone. With a `rotary_fraction` below 1, the first w
    channels of a head are rotated and the others carry no position (GPT-NeoX). Angles are computed
    in float32 whatever the model's dtype, then their cosines and sines are rounded to it. w follows
    from the width of q, so that a mechanism may rotate a slice of its channels.
    Raises ValueError for a width that holds no whole number of pairs.
    """

    #: Factor on the rotary channels of q and of k (YaRN).
    attention_factor = 1.0

    def __init__(self, shape: Shape, *, base: float, rotary_fraction: float) -> None:
        super().__init__(shape)
        if shape.head_dim % 2:
            raise ValueError(
                f"RoPE rotates pairs of channels and needs an even head_dim, not "
                f"dim={shape.dim} / n_heads={shape.n_heads} = {shape.head_dim}"
            )
        if not base > 1:
            raise ValueError(f"base={base} must be above 1")
        if not 0 < rotary_fraction <= 1:
            raise ValueError(f"rotary_fraction={rotary_fraction} must be above 0, and at most 1")
        self.base = base
        self.rotary_fraction = rotary_fraction
        self.rotary_dim(shape.head_dim)

    def rotate(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        return self.at(pos).rotate(q, k)

    def at(self, pos: Tensor) -> Positions:
        return RotaryPositions(self, pos)

    def angles(self, width: int, pos: Tensor) -> Tensor:
        """Angle of each pair, in radians: pos (T,) -> (T, width / 2)."""
        return pos[:, None].float() * self.inv_freq(width, pos.device)

    def inv_freq(self, width: int, device: torch.device) -> Tensor:
        """Radians per token of each pair, float32: (width / 2,)."""
        return inv_freq(self.base, width, device)

    def rotary_dim(self, width: int) -> int:
        """Number of rotary channels of a head of this width."""
        exact = self.rotary_fraction * width
        rotary_dim = round(exact)
        if rotary_dim % 2 or rotary_dim < 2 or abs(rotary_dim - exact) > 1e-6:
            raise ValueError(
                f"rotary_fraction={self.rotary_fraction} of {width} channels is {exact:g}, "
                "not an even number"
            )
        return rotary_dim


class RotaryPositions(Positions):
    """The positions of one forward pass; its layers share their cosines and sines."""

    def __init__(self, scheme: RoPE, pos: Tensor) -> None:
        super().__init__(scheme, pos)
        self.rope = scheme
        self.known: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.cos_sin(self.rope.rotary_dim(q.size(-1)), q.dtype)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)

    def cos_sin(self, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and signed sin (T, width) as `apply_rotary` takes them."""
        if (width, dtype) in self.known:
            return self.known[width, dtype]
        angles = self.rope.angles(width, self.pos)
        cos = self.rope.attention_factor * angles.cos()
        sin = self.rope.attention_factor * angles.sin()
        both = torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
        if not torch.compiler.is_compiling():  # which merges equal computations itself
            self.known[width, dtype] = both
        return both


def at_least_one(factor: float) -> float:
    """The factor of a longer context. Raises ValueError below 1."""
    if factor < 1:
        raise ValueError(f"factor={factor} must be at least 1")
    return factor


def inv_freq(base: float, width: int, device: torch.device) -> Tensor:
    """base^(-2i/width) for each pair i, float32: (width / 2,)."""
    even = torch.arange(0, width, 2, device=device, dtype=torch.float32)
    return base ** (-even / width)
