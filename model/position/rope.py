"""Rotary positions."""

import torch
from torch import Tensor

from model.position.base import Position
from model.shape import Shape


class RoPE(Position):
    """Rotates each pair (x_i, x_{i + Dh/2}) of q and k by p * base^(-2i/Dh).

    Su et al. 2021, https://arxiv.org/abs/2104.09864, in the half-split layout of Llama checkpoints
    (the paper interleaves the pairs; the two differ by a permutation of channels). The score of
    query i and key j then depends on i - j alone. Angles are float32 whatever the model's dtype,
    and follow from the width of q, so that a mechanism may rotate a slice.
    Raises ValueError if head_dim is odd.
    """

    def __init__(self, shape: Shape, *, base: float) -> None:
        super().__init__(shape)
        if shape.head_dim % 2:
            raise ValueError(
                f"RoPE turns pairs of channels and needs an even head_dim, not "
                f"dim={shape.dim} / n_heads={shape.n_heads} = {shape.head_dim}"
            )
        if not base > 1:
            raise ValueError(f"base={base} must be above 1")
        self.base = base

    def rotate(self, q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
        angles = self.angles(q.size(-1), pos)
        cos, sin = angles.cos(), angles.sin()
        return turn(q, cos, sin), turn(k, cos, sin)

    def angles(self, width: int, pos: Tensor) -> Tensor:
        """Angle of each pair, in radians: pos (T,) -> (T, width / 2)."""
        even = torch.arange(0, width, 2, device=pos.device, dtype=torch.float32)
        return pos[:, None].float() * self.base ** (-even / width)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of x (..., T, Dh) by angles with these cosines and sines (T, Dh / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
