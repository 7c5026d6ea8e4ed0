"""Rotary positions, extended to a longer context by YaRN."""

import math

import torch
from torch import Tensor

from model.position.rope import RoPE, at_least_one
from model.shape import Shape


class YaRN(RoPE):
    """RoPE with its slow pairs interpolated by `factor` and its fast pairs unchanged.

    A pair with more than `beta_fast` rotations in `original_max_len` tokens keeps its frequency, one
    with fewer than `beta_slow` has it divided by `factor`, with a linear ramp between. Rotary
    channels are multiplied by 0.1 ln(factor) + 1, which sharpens the softmax over more keys. Peng et
    al. 2023, https://arxiv.org/abs/2309.00071; the ends of the ramp are rounded outwards to whole
    pairs, as in the authors' code. Raises ValueError for a factor below 1, or an empty ramp.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        base: float,
        rotary_fraction: float,
        factor: float,
        original_max_len: int | None,
        beta_fast: float,
        beta_slow: float,
    ) -> None:
        super().__init__(shape, base=base, rotary_fraction=rotary_fraction)
        self.original_max_len = shape.max_len if original_max_len is None else original_max_len
        if self.original_max_len < 1:
            raise ValueError(f"original_max_len={original_max_len} must be at least 1")
        if not 0 < beta_slow < beta_fast:
            raise ValueError(
                f"beta_slow={beta_slow} must be above 0 and below beta_fast={beta_fast}"
            )
        self.factor = at_least_one(factor)
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.attention_factor = 0.1 * math.log(factor) + 1

    def inv_freq(self, width: int, device: torch.device) -> Tensor:
        fast = max(math.floor(self.pair_of(self.beta_fast, width)), 0)
        slow = min(math.ceil(self.pair_of(self.beta_slow, width)), width - 1)
        pair = torch.arange(width // 2, device=device, dtype=torch.float32)
        interpolated = ((pair - fast) / max(slow - fast, 1e-3)).clamp(0, 1)
        original = super().inv_freq(width, device)
        return original * (1 - interpolated) + original / self.factor * interpolated

    def pair_of(self, rotations: float, width: int) -> float:
        """The (fractional) index of the pair with this many rotations in the original length."""
        wavelength = self.original_max_len / (2 * math.pi * rotations)
        return width * math.log(wavelength) / (2 * math.log(self.base))
