"""Gaussian relative positions.

Shapes: T queries, S keys, H heads.
"""

import torch
from torch import Tensor, nn

from model.position.base import Position
from model.shape import Shape

#: Standard deviation, in tokens, of the widest head at the start.
WIDEST = 20.0


class Gaussian(Position):
    """Adds -a_h (i - j - c_h)^2 to the score of query i and key j: a bell around c_h tokens back.

    Quadratic encoding of Cordonnier et al. 2020, https://arxiv.org/abs/1911.03584, in one dimension.
    With large a_h a head takes the token c_h back alone, and heads without content are the taps of a
    convolution. `centres` are c_h at the start; None is 0 to H - 1. The sharpness a_h starts at 1 in
    the first head and falls geometrically to 1 / (2 * 20^2) in the last. With `learned`, c_h and
    log a_h are trained as offsets from there, shared by all layers.
    Raises ValueError for centres that are negative or not one per head.
    """

    by_distance = True
    centres: Tensor
    sharpness: Tensor
    centre_bias: Tensor
    width_bias: Tensor

    def __init__(self, shape: Shape, *, centres: list[float] | None, learned: bool) -> None:
        super().__init__(shape)
        n_heads = shape.n_heads
        centres = [float(h) for h in range(n_heads)] if centres is None else centres
        if len(centres) != n_heads or min(centres) < 0:
            raise ValueError(
                f"centres={centres} must be n_heads={n_heads} numbers, none below 0, or null"
            )
        steps = torch.arange(n_heads) / (n_heads - 1) if n_heads > 1 else torch.ones(1)
        self.register_buffer("centres", torch.tensor(centres), persistent=False)
        self.register_buffer("sharpness", (2 * WIDEST**2) ** -steps, persistent=False)
        for name in ("centre_bias", "width_bias"):  # a name that starts at 0
            offset = torch.zeros(n_heads)
            if learned:
                self.register_parameter(name, nn.Parameter(offset))
            else:
                self.register_buffer(name, offset, persistent=False)

    def bias(self, q_pos: Tensor, k_pos: Tensor) -> Tensor:
        back = (q_pos[:, None] - k_pos).float()  # (T, S)
        centre = self.centres + self.centre_bias
        sharpness = self.sharpness * self.width_bias.exp()
        off = back - centre[:, None, None]  # (H, T, S)
        return -sharpness[:, None, None] * off.square()
