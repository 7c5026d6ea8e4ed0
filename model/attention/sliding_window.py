"""Sliding-window attention.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim, N tokens, w window.
"""

import math

import torch
from torch import Tensor

from model.attention.attend import choose_kernel
from model.attention.base import Bias
from model.attention.grouped import GQA
from model.shape import Shape

#: Fewest queries that share a block of keys: fewer would waste less, but cost more calls.
BLOCK = 64


class Sliding(GQA):
    """Grouped-query attention in which a token sees itself and the floor(w / 2) tokens before it.

    Beltagy et al. 2020, https://arxiv.org/abs/2004.05150, causal half; Mistral's W counts the token
    itself: W = floor(w / 2) + 1. Queries go in blocks, each against the keys within its reach, so
    time and memory are O(N w), and the cache keeps W tokens. From w = 2 (N - 1) on it is full
    attention. `window` None is max_len; `n_kv_heads` None is n_heads.
    Raises ValueError for a negative window.
    """

    keep: int

    def __init__(
        self, shape: Shape, layer: int, *, window: int | None, n_kv_heads: int | None
    ) -> None:
        super().__init__(
            shape, layer, n_kv_heads=shape.n_heads if n_kv_heads is None else n_kv_heads
        )
        window = shape.max_len if window is None else window
        if window < 0:
            raise ValueError(f"window={window} must be at least 0, or null for max_len")
        self.back = window // 2
        self.keep = self.back + 1  # itself included

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        if k.size(2) <= self.keep:  # nothing lies outside
            return super().attend(q, k, v, q_pos, k_pos, bias)

        def within(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            far = q_pos[:, None] - k_pos > self.back
            mask = torch.zeros(far.shape, device=far.device).masked_fill_(far, -math.inf)
            added = bias(q_pos, k_pos)
            return mask if added is None else added + mask

        sizes = self.blocks(q.size(2))
        if len(sizes) == 1:  # against all keys that there are
            return super().attend(q, k, v, q_pos, k_pos, within)
        parts = zip(
            q.split(sizes, dim=2),
            self.windows(k, sizes, 2),
            self.windows(v, sizes, 2),
            q_pos.split(sizes),
            self.windows(k_pos, sizes, 0),
            strict=True,
        )
        pieces = []
        for part in parts:
            pieces.append(super().attend(*part, within))  # noqa: PERF401 - super() needs a loop
        return torch.cat(pieces, dim=2)

    def blocks(self, queries: int) -> list[int]:
        """How many queries each block has."""
        size = max(BLOCK, self.back)
        return [min(size, queries - start) for start in range(0, queries, size)]

    def windows(self, x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
        """For each block of queries, its own part of x and the `back` before it.

        Made of splits: the gradient of a slice of all of x would be as long as x, for every block.
        """
        cached = x.size(dim) - sum(sizes)
        pieces = x.split([cached, *sizes], dim)
        tails = [
            p.narrow(dim, max(0, n - self.back), min(n, self.back))
            for p, n in zip(pieces, [cached, *sizes], strict=True)
        ]
        return [torch.cat(pair, dim) for pair in zip(tails[:-1], pieces[1:], strict=True)]

    def cache_elements(self, length: int) -> int:
        """As of grouped-query attention, for the last W tokens."""
        return super().cache_elements(min(length, self.keep))

    def score_flops(self, length: int, causal: bool) -> float:
        """Of the window alone, or with the corners of the blocks."""
        if causal:
            inner, ramp = max(0, length - self.keep), min(length, self.keep)
            pairs = ramp * ramp / 2 + inner * (self.back + 0.5)
        elif length <= self.keep:
            pairs = length * length
        else:
            sizes = self.blocks(length)
            pairs = sum(n * (n + min(self.back, i * sizes[0])) for i, n in enumerate(sizes))
        return 4 * self.n_heads * self.head_dim * pairs / length

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """As of grouped-query attention, over the window."""
        return super().decode_flops(min(length, self.back), cached=cached)

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """Beyond the window, the kernel for a block with a mask."""
        if length <= self.keep:
            return super().kernel(device, dtype, length, biased)
        keys = min(length, max(BLOCK, self.back) + self.back)
        return choose_kernel(device, dtype, keys, biased=True, p=self.dropout)
