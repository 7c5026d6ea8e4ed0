"""Attention over keys and values that a short convolution has mixed.

Shapes: B batch, T new tokens, D dim, C channels of all KV heads, W width of the convolution.
"""

import torch
from torch import Tensor, nn

from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.shape import Shape


class ShortConv(nn.Module):
    """A causal depthwise convolution beside the identity: y_t = x_t + sum_i taps_i x_(t-i), i < W.

    Shifted multiply-adds. Taps start at 0, so that it starts as the identity.
    """

    init_std = 0.0

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.empty(width, channels))

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x (B, T, C) after the W - 1 tokens `before` (B, W - 1, C) -> (B, T, C)."""
        tokens, T = torch.cat((before, x), dim=1), x.size(1)
        y = x
        for i, tap in enumerate(self.taps.to(x.dtype)):
            start = before.size(1) - i
            y = torch.addcmul(y, tap, tokens[:, start : start + T])
        return y


class ShortConvAttention(GQA):
    """Grouped-query attention over keys and values mixed with those of the W - 1 tokens before.

    The KV part of Canon-B (Allen-Zhu 2025, https://arxiv.org/abs/2512.17351): a `ShortConv` after
    each projection, before heads are normalised and rotated. With taps 0, as at the start, it is
    grouped-query attention. No kernel of attention is lost.
    Costs beside its parent's: 2 W C parameters, elementwise work alone, and 2 (W - 1) C cached
    numbers, the last projections. Raises ValueError for a width below 1.
    """

    def __init__(
        self, shape: Shape, layer: int, *, width: int, n_kv_heads: int | None, qk_norm: bool
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        if width < 1:
            raise ValueError(f"width={width} must be at least 1")
        self.width, self.channels = width, self.n_kv_heads * shape.head_dim
        self.k_conv, self.v_conv = (ShortConv(self.channels, width) for _ in range(2))

    def keys_values(self, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        k, v = self.k(x), self.v(x)  # (B, T, C)
        state = () if cache is None else cache.state
        none = k.new_zeros(k.size(0), self.width - 1, self.channels)
        k_before, v_before = state or (none, none)
        if cache is not None:
            pairs = ((k_before, k), (v_before, v))
            cache.state = tuple(torch.cat(pair, dim=1)[:, k.size(1) :].clone() for pair in pairs)
        k = self.heads(self.k_conv(k, k_before), self.n_kv_heads)
        return self.k_norm(k), self.heads(self.v_conv(v, v_before), self.n_kv_heads)

    def cache_elements(self, length: int) -> int:
        """As in grouped-query attention, and the last W - 1 projections to keys and to values."""
        return super().cache_elements(length) + 2 * (self.width - 1) * self.channels
