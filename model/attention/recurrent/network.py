"""What recurrent networks share.

Shapes: B batch, T new tokens, D dim, R width of the state.
"""

import math

import torch
from torch import Tensor, nn

from model.attention.cache import LayerCache
from model.attention.recurrent.base import Recurrent
from model.shape import Shape


class Network(Recurrent):
    """A recurrent network: a state of width R, from x W_x + b and W_h h, read by W_o.

    `gates` is the number of vectors that make the next state. Raises ValueError for a width below 1.
    """

    def __init__(self, shape: Shape, layer: int, width: int | None, gates: int) -> None:
        super().__init__(shape, layer)
        if width is not None and width < 1:
            raise ValueError(f"width={width} must be at least 1, or null for dim={shape.dim}")
        self.width = shape.dim if width is None else width
        self.input = nn.Linear(shape.dim, gates * self.width, bias=shape.bias)
        self.recurrent = StateMatrix(self.width, gates * self.width)
        self.out = nn.Linear(self.width, shape.dim, bias=shape.bias)

    def state_before(self, x: Tensor, cache: LayerCache | None) -> list[Tensor]:
        """The state before the first token of x (B, T, *), float32; at first zeros."""
        zeros = x.new_zeros(len(x), self.width, dtype=torch.float32)
        return [zeros if held is None else held for held in self.held(cache)]

    # Cost

    def score_flops(self, length: int, causal: bool) -> float:
        """None: a network has no products but those with its weights."""
        return 0

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """All matrices once; without the state, those that make it for every token."""
        state = self.input.weight.numel() + self.recurrent.weight.numel()
        return 2 * (state * (1 if cached else length + 1) + self.out.weight.numel())


class StateMatrix(nn.Linear):
    """The matrix of a network's state, of width R: drawn N(0, 1 / R).

    Its spectral radius is near 1 then. At the spread of other matrices, 0.02, a state of 192 numbers
    would shrink to a quarter with every token.
    """

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)
        self.init_std = 1 / math.sqrt(width)
