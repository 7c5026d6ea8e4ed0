"""Attention with linear biases."""

import torch
from torch import Tensor

from model.position.base import Position
from model.shape import Shape


class ALiBi(Position):
    """Adds -slope * (i - j) to the score of query i and key j, a fixed slope for each head.

    Press et al. 2021, https://arxiv.org/abs/2108.12409.
    """

    by_distance = True
    slopes: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.register_buffer("slopes", torch.tensor(slopes(shape.n_heads)), persistent=False)

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        distance = q_pos[:, None] - k_pos  # (T, S)
        return -self.slopes[:, None, None] * distance  # (H, T, S)


def slopes(n_heads: int) -> list[float]:
    """2^(-8 i / n) for i = 1 ... n, if the number n of heads is a power of two.

    Otherwise the slopes of the next lower power of two, then every second one of the next higher:
    the authors' rule, https://github.com/ofirpress/attention_with_linear_biases.
    """
    n = 1 << (n_heads.bit_length() - 1)
    lower = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    higher = [2 ** (-4 * i / n) for i in range(1, 2 * n + 1, 2)]
    return lower + higher[: n_heads - n]
