"""Rotary positions with a base that grows with the context."""

import torch
from torch import Tensor

from model.position.rope import RoPE, at_least_one, inv_freq
from model.shape import Shape


class NTKRoPE(RoPE):
    """RoPE with base * factor^(w / (w - 2)) for w rotary channels.

    The slowest pair rotates `factor` times slower, the fastest as before. "NTK-aware" scaling, described in section 3.1 of
    https://arxiv.org/abs/2309.00071. Raises ValueError for a factor below 1, or a single pair.
    """

    def __init__(self, shape: Shape, *, base: float, rotary_fraction: float, factor: float) -> None:
        super().__init__(shape, base=base, rotary_fraction=rotary_fraction)
        self.factor = at_least_one(factor)

    def inv_freq(self, width: int, device: torch.device) -> Tensor:
        if width < 4:
            raise ValueError(f"NTK scaling needs at least 4 rotary channels, not {width}")
        return inv_freq(self.base * self.factor ** (width / (width - 2)), width, device)
