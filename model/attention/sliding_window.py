"""Sliding-window attention.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim, N tokens, W window.
"""

import math

import torch
from torch import Tensor

from model.attention.attend import attend_flex
from model.attention.cache import LayerCache, RingCache
from model.attention.grouped import GQA
from model.attention.kernel import takes_window
from model.ops.attention import Bias
from model.ops.window_attention import window_attention
from model.shape import Shape

#: Minimum number of queries per block: smaller blocks compute fewer hidden pairs in more calls.
BLOCK = 64


class SlidingWindow(GQA):
    """Grouped-query attention in which a token sees the last W tokens, itself included.

    Mistral's W (https://arxiv.org/abs/2310.06825); Longformer's w (Beltagy et al. 2020,
    https://arxiv.org/abs/2004.05150) counts both sides: W = floor(w / 2) + 1. Where the kernel takes
    no window, queries are processed in blocks, each against the keys within its reach. So time and
    memory are O(N W), and the cache keeps W tokens. `window` None is half the context, max_len // 2 + 1;
    `n_kv_heads` None is n_heads. Raises ValueError for a window below 1.
    """

    def __init__(
        self,
        shape: Shape,
        layer: int,
        *,
        window: int | None,
        n_kv_heads: int | None,
        qk_norm: bool,
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        self.window = shape.max_len // 2 + 1 if window is None else window
        if self.window < 1:
            raise ValueError(f"window={window} must be at least 1, or null for half the context")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        if k.size(2) <= self.window:  # no key lies outside
            return super().attend(q, k, v, q_pos, k_pos, bias)
        p, biased = self.dropout * self.training, bias(q_pos[:1], k_pos[:1]) is not None
        if self.in_flex(q, k, p):
            return attend_flex(q, k, v, k_pos, bias, self.window)
        if q.size(2) == k.size(2) and self.in_kernel(q.device.type, q.dtype, biased, p):
            return window_attention(q, k, v, self.window)
        within = self.within(bias)
        sizes = self.blocks(q.size(2))
        if len(sizes) == 1:
            return super().attend(q, k, v, q_pos, k_pos, within)
        blocks = zip(
            q.split(sizes, dim=2),
            self.reachable(k, sizes, 2),
            self.reachable(v, sizes, 2),
            q_pos.split(sizes),
            self.reachable(k_pos, sizes, 0),
            strict=True,
        )
        attend = super().attend
        return torch.cat([attend(*block, within) for block in blocks], dim=2)

    @property
    def takes_flex(self) -> bool:
        return type(self).attend is SlidingWindow.attend

    def in_kernel(self, device: str, dtype: torch.dtype, biased: bool, p: float) -> bool:
        """True where the kernel of full attention takes a window."""
        return takes_window(
            device, dtype, width=self.kernel_width, biased=biased, p=p, asked=self.asked_kernel
        )

    def within(self, bias: Bias) -> Bias:
        """The bias, and -inf for keys before the window."""

        def masked(q_pos: Tensor, k_pos: Tensor) -> Tensor:
            far = q_pos[:, None] - k_pos >= self.window
            mask = torch.zeros(far.shape, device=far.device).masked_fill_(far, -math.inf)
            scheme = bias(q_pos, k_pos)
            return mask if scheme is None else scheme + mask

        return masked

    def blocks(self, queries: int) -> list[int]:
        """Number of queries in each block."""
        size = max(BLOCK, self.window - 1)
        return [min(size, queries - start) for start in range(0, queries, size)]

    def reachable(self, x: Tensor, sizes: list[int], dim: int) -> list[Tensor]:
        """For each block of queries, its own part of x and the W - 1 tokens before it.

        Splits, not slices: the gradient of a slice is as long as all of x, for every block. Each
        block is cut once, and the end of it is joined to the next one:

            x        |  cached  |  block 0  |  block 1  | ...
            block 1                    |tail|  block 1  |
        """
        before = self.window - 1
        cached = x.size(dim) - sum(sizes)
        parts = x.split([cached, *sizes], dim)
        tails = [
            p.narrow(dim, max(0, n - before), min(n, before))
            for p, n in zip(parts, [cached, *sizes], strict=True)
        ]
        return [torch.cat(pair, dim) for pair in zip(tails[:-1], parts[1:], strict=True)]

    def new_cache(self, capacity: int) -> LayerCache:
        return RingCache(capacity, self.window)

    # Cost

    def cache_elements(self, length: int) -> int:
        """As in grouped-query attention, for the last W tokens."""
        return super().cache_elements(min(length, self.window))

    def score_flops(self, length: int, causal: bool) -> float:
        """Pairs within the window; unless `causal`, all pairs of the blocks of a CPU."""
        if causal:
            inner, ramp = max(0, length - self.window), min(length, self.window)
            pairs = ramp * ramp / 2 + inner * (self.window - 0.5)
        elif length <= self.window:
            pairs = length * length
        else:
            sizes = self.blocks(length)
            pairs = sum(n * (n + min(self.window - 1, i * sizes[0])) for i, n in enumerate(sizes))
        return self.pair_flops * pairs / length

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """As in grouped-query attention, over the window."""
        return super().decode_flops(min(length, self.window - 1), cached=cached)

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """The kernel of a block, which has a mask, where the sequence exceeds the window.

        That of full attention where it takes the window.
        """
        inside = self.in_kernel(device, dtype, biased, self.dropout)
        if length <= self.window or inside or self.asked_kernel == "flex":
            return super().kernel(device, dtype, length, biased)
        keys = min(length, max(BLOCK, self.window - 1) + self.window - 1)
        return super().kernel(device, dtype, keys, biased=True)
