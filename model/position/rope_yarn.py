"""Rotary positions, YaRN's way to a longer context."""

import math

import torch
from torch import Tensor

from model.position.rope import RoPE, at_least_one
from model.shape import Shape


class YaRN(RoPE):
    """RoPE whose slow pairs are interpolated by `factor` while its fast ones stay as they are.

    A pair that turns more than `beta_fast` times within `original_max_len` tokens keeps its frequency,
    one that turns less than `beta_slow` times has it divided by `factor`, and a ramp joins the two.
    Turned channels grow by 0.1 ln(factor) + 1, which sharpens the softmax over more keys. Peng et al.
    2023, https://arxiv.org/abs/2309.00071; the ends of the ramp are rounded outwards to whole pairs,
    as in the authors' code. Raises ValueError for a factor below 1, or a ramp without ends.
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
        fast = max(math.floor(self.pair_turning(self.beta_fast, width)), 0)
        slow = min(math.ceil(self.pair_turning(self.beta_slow, width)), width - 1)
        pair = torch.arange(width // 2, device=device, dtype=torch.float32)
        interpolated = ((pair - fast) / max(slow - fast, 1e-3)).clamp(0, 1)
        own = super().inv_freq(width, device)
        return own * (1 - interpolated) + own / self.factor * interpolated

    def pair_turning(self, times: float, width: int) -> float:
        """The (fractional) pair that turns so many times within the original length."""
        turned = self.original_max_len / (2 * math.pi * times)
        return width * math.log(turned) / (2 * math.log(self.base))
