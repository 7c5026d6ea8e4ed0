"""Rotary positions, linearly interpolated to a longer context."""

import torch
from torch import Tensor

from model.position.rope import RoPE, at_least_one
from model.shape import Shape


class LinearRoPE(RoPE):
    """RoPE at positions p / factor: `factor` times the context covers the trained range of angles.

    Position interpolation, Chen et al. 2023, https://arxiv.org/abs/2306.15595.
    Raises ValueError for a factor below 1.
    """

    def __init__(self, shape: Shape, *, base: float, rotary_fraction: float, factor: float) -> None:
        super().__init__(shape, base=base, rotary_fraction=rotary_fraction)
        self.factor = at_least_one(factor)

    def inv_freq(self, width: int, device: torch.device) -> Tensor:
        return super().inv_freq(width, device) / self.factor
