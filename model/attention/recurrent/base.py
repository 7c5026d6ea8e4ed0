"""What recurrent mixers share.

Shapes: B batch, T new tokens.
"""

import math

import torch
from torch import Tensor

from model.attention.base import Attention
from model.attention.cache import LayerCache


class Recurrent(Attention):
    """A mixer of tokens whose past is a state of fixed size.

    It compares no pairs of tokens, so positions can act through the embeddings alone. The state is
    float32 in every dtype: what a long text adds to it would be lost in fewer digits.
    """

    heeds = frozenset({"embed"})
    own_kernel = "recurrence"

    def state_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the tensors of one sequence's state."""
        raise NotImplementedError

    def new_cache(self, capacity: int) -> LayerCache:
        return LayerCache(capacity)

    def held(self, cache: LayerCache | None) -> tuple[Tensor | None, ...]:
        """The state before the first new token; None for each of its tensors where there is none."""
        nothing = (None,) * len(self.state_shapes())
        return nothing if cache is None else cache.state or nothing

    def keep(self, cache: LayerCache | None, tokens: int, *state: Tensor | None) -> None:
        """Leave the state in the cache, if there is one, after so many more tokens."""
        if cache is not None:
            cache.advance(tokens)
            # Copies: a view of the last token would keep the memory of all of them.
            cache.state = tuple(x.to(torch.float32, copy=True) for x in state if x is not None)

    # Cost

    def cache_elements(self, length: int) -> int:
        """Numbers in the state, whatever the length."""
        return sum(math.prod(shape) for shape in self.state_shapes())

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        return torch.float32.itemsize * self.cache_elements(length)
