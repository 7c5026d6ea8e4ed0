"""What recurrent mixers share.

Shapes: B batch, T new tokens, D dim, R width of a state.
"""

import math

import torch
from torch import Tensor, nn

from model.attention.base import Attention
from model.cache import LayerCache
from model.shape import Shape


class Recurrent(Attention):
    """A mixer of tokens whose past is a state of fixed size.

    It compares no pairs of tokens, so positions can act through the embeddings alone. The state is
    float32 in every dtype: what a long text adds to it would be lost in fewer digits.
    """

    heeds = frozenset({"embed"})

    def state_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors of one sequence's state."""
        raise NotImplementedError

    def new_cache(self, capacity: int) -> LayerCache:
        return LayerCache(capacity)

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        return "recurrence"

    def state_before(self, x: Tensor, cache: LayerCache | None) -> list[Tensor]:
        """The state before the first token of x (B, T, *); zeros where there is none."""
        if cache is not None and cache.state:
            return list(cache.state)
        return [x.new_zeros(len(x), *shape, dtype=torch.float32) for shape in self.state_shapes()]

    def keep(self, cache: LayerCache | None, tokens: int, *state: Tensor) -> None:
        """Leave the state in the cache, after so many more tokens."""
        if cache is not None:
            cache.advance(tokens)
            cache.state = tuple(x.float() for x in state)

    # Cost

    def cache_elements(self, length: int) -> int:
        """Numbers in the state, whatever the length."""
        return sum(math.prod(shape) for shape in self.state_shapes())

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        return torch.float32.itemsize * self.cache_elements(length)


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
