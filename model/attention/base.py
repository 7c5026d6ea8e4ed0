"""What an attention mechanism offers to the model that holds it."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from model.cache import KVCache

Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Bias = Callable[[Tensor, Tensor], Tensor | None]


class Mechanism(Protocol):
    """A module built as `Mechanism(shape, layer, *, <its own choices>)`.

    It says itself what it caches and what it costs: cache, plan and report ask it, never its name.
    Its last projection is called `out`: the scaled initialisation finds it by that name.
    """

    #: Heads that keys and values have of their own; None for a mechanism without such heads.
    n_kv_heads: int | None

    def __call__(
        self, x: Tensor, pos: Tensor, rotate: Rotate, bias: Bias, cache: KVCache | None
    ) -> Tensor:
        """Attend over x (B, T, D) at positions pos (T,) -> (B, T, D).

        `rotate` and `bias` are the hooks of the position scheme; with a cache, the T tokens follow
        those that it holds.
        """
        ...

    def cache_elements(self, length: int) -> int:
        """Numbers that a sequence's cache holds after so many tokens."""
        ...

    def score_flops(self, length: int, causal: bool) -> float:
        """Forward FLOPs of scores and values in training, for one token of a sequence of this length.

        All that is computed; with `causal`, the pairs that a query may see alone, its own counted
        half: half of the full square where nothing else limits it.
        """
        ...

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """FLOPs of attention for one token that follows `length` others, projections included.

        Without a cache, what it would hold of the others is computed again.
        """
        ...

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """The kernel that `attend` takes in training at this length."""
        ...
