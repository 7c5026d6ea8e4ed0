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

    n_kv_heads: int

    def __call__(
        self, x: Tensor, pos: Tensor, rotate: Rotate, bias: Bias, cache: KVCache | None
    ) -> Tensor:
        """Attend over x (B, T, D) at positions pos (T,) -> (B, T, D).

        `rotate` and `bias` are the hooks of the position scheme; with a cache, the T tokens follow
        those that it holds.
        """
        ...

    @property
    def cache_elements(self) -> int:
        """Numbers cached per token."""
        ...

    def score_flops(self, length: int, causal: bool) -> float:
        """Forward FLOPs of scores and values for one token of a sequence of this length.

        With `causal` half of the full square is counted.
        """
        ...

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """The kernel that `attend` takes in training at this length."""
        ...
