"""The interface between an attention mechanism and the model.

Shapes: B batch, T new tokens, S tokens so far, D dim, H heads.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from model.attention.attend import attend, attend_flex
from model.attention.cache import FullCache, LayerCache
from model.attention.kernel import check_kernel, choose_kernel, refusal
from model.ops.attention import Bias
from model.position.base import HOOKS, Position, Positions
from model.shape import Shape


class Attention(nn.Module):
    """One layer's attention, built as `Attention(shape, layer, *, <options of its config>)`.

    A mechanism states its own cache and costs; the cost report asks it and never its name. Its last
    projection must be called `out`: scaled initialisation finds it by that name.
    """

    #: Number of key/value heads; None for a mechanism without them.
    n_kv_heads: int | None = None
    #: The hooks of position schemes that the mechanism has a use for; others are refused.
    heeds: frozenset[str] = HOOKS
    #: False for heads that see different keys: pairs are then counted as a mean over them.
    heads_see_alike = True
    #: The kernel asked for, see model/attention/kernel.py.
    asked_kernel = "auto"
    #: The name of a computation of its own, for what no kernel of torch's can do.
    own_kernel: str | None = None

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, shape.dropout
        self.prefix: nn.Module | None = None  # trained keys and values, see model/tuning/prefix.py
        self.n_heads, self.head_dim = shape.n_heads, shape.head_dim
        self.key_dim = shape.head_dim  # channels of a query and of a key

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        """Attend over x (B, T, D) -> (B, T, D); with a cache, x follows the tokens it holds."""
        raise NotImplementedError

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        """Attention weights (B, H, T, T) over x (B, T, D), float32, for analysis alone."""
        raise NotImplementedError

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        """Causal attention of q (B, H, T, Dh) over k and v (B, Hkv, S, *), with dropout in training."""
        p = self.dropout if self.training else 0.0
        if self.in_flex(q, k, p):
            return attend_flex(q, k, v, k_pos, bias)
        return attend(q, k, v, q_pos, k_pos, bias, p, self.asked_kernel)

    @property
    def takes_flex(self) -> bool:
        """True where `attend` is given keys of the text and the bias of positions, as they are."""
        return type(self).attend is Attention.attend

    def in_flex(self, q: Tensor, k: Tensor, p: float) -> bool:
        """True where FlexAttention was asked for and is worth it: a whole text, in a compiled program."""
        if self.asked_kernel != "flex" or not self.takes_flex or not torch.compiler.is_compiling():
            return False
        about: dict[str, Any] = {"width": self.kernel_width, "biased": False, "p": p}
        return q.size(2) == k.size(2) and not refusal("flex", q.device.type, q.dtype, **about)

    def cross(self, x: Tensor, positions: Positions, y: Tensor, y_positions: Positions) -> Tensor:
        """Attend from x (B, T, D) over y (B, S, D), each row to those at its place and before."""
        raise NotImplementedError

    @property
    def crosses(self) -> bool:
        """True for a mechanism that can `cross`."""
        return False

    @property
    def takes_prefix(self) -> bool:
        """True if every query can see a `prefix` of keys and values before those of the text."""
        return False

    @property
    def has_weights(self) -> bool:
        """True for a mechanism that weighs pairs of tokens: one with `weights`."""
        return type(self).weights is not Attention.weights

    def new_cache(self, capacity: int) -> LayerCache:
        """An empty cache of this layer for up to `capacity` tokens."""
        return FullCache(capacity)

    def cache_elements(self, length: int) -> int:
        """Numbers that the cache of one sequence holds after `length` tokens."""
        raise NotImplementedError

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Bytes of that cache where activations have this dtype, and what is cached has it too."""
        return self.cache_elements(length) * dtype.itemsize

    def score_flops(self, length: int, causal: bool) -> float:
        """Forward FLOPs of scores and weighted values, per token of a training sequence.

        All FLOPs that are computed; with `causal`, those of visible pairs only, where a token's
        pair with itself counts half: half of the full square for full attention.
        """
        raise NotImplementedError

    def score_backward(self, trains_bias: bool) -> int:
        """Products of the backward pass for each one that `score_flops` counts in the forward.

        `trains_bias`: the bias that positions add to the scores has parameters.
        """
        return 2

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """FLOPs of one token after `length` others, projections included.

        Without a cache, keys and values of the others are computed again.
        """
        raise NotImplementedError

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """The kernel that computes attention in training at this length.

        Raises ValueError where the kernel asked for cannot do it.
        """
        if self.own_kernel is not None:
            return self.own_kernel
        about: dict[str, Any] = {"width": self.kernel_width, "biased": biased, "p": self.dropout}
        check_kernel(self.asked_kernel, device, dtype, **about)
        return choose_kernel(device, dtype, length, **about, asked=self.asked_kernel)

    @property
    def kernel_width(self) -> int:
        """Channels of a head in the attention kernel, of keys or of values, whichever are more."""
        return max(self.key_dim, self.head_dim)


def weight_of(layer: nn.Linear) -> Tensor:
    """The weight (O, I) of a layer that is not called, with what finetuning has added to it."""
    merged: Callable[[], Tensor] | None = getattr(layer, "merged", None)
    return layer.weight if merged is None else merged()


class PairRefused(ValueError):
    """An attention has no use for a position scheme."""


def check_hooks(position: Position, layers: list[Attention]) -> None:
    """Raise PairRefused for a scheme with a hook that none of its layers has a use for."""
    for scheme in dict.fromkeys(position.of_layer(i) for i in range(len(layers))):
        its = [a for i, a in enumerate(layers) if position.of_layer(i) is scheme]
        heeded = frozenset[str]().union(*(attention.heeds for attention in its))
        if unused := sorted(scheme.hooks - heeded):
            kinds = " and ".join(dict.fromkeys(type(attention).__name__ for attention in its))
            raise PairRefused(
                f"{type(scheme).__name__} acts through `{unused[0]}`, which {kinds} has no use for; "
                f"schemes that act through {' or '.join(sorted(heeded)) or 'nothing'} alone work, "
                "and pos=none"
            )
