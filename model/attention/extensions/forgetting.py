"""Forgetting attention.

Shapes: B batch, T new tokens, S tokens so far, D dim, H query heads, Hkv KV heads, Dh head_dim.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.position.base import Positions
from model.shape import Shape


class ForgettingAttention(GQA):
    """Grouped-query attention in which each token lets a head forget those before it.

    score_ij + c_i - c_j with c_t = log f_1 + ... + log f_t, where f_t = sigmoid(w x_t + b) is the
    forget gate of a KV head (FoX; Lin et al. 2025, https://arxiv.org/abs/2503.02130, who use no
    positions beside, pos=none, and one KV head a query head). At gates of 1 it is grouped-query
    attention; they start near 1/2. The bias is a product of four further channels of queries and
    keys, so that every kernel serves and no (T, S) bias is made.
    Costs beside its parent's: (D + 1) Hkv parameters, four channels of the scores, as many more
    numbers in the cache per KV head and token, and two per KV head: c of the last token.
    """

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None, qk_norm: bool) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        self.forget = nn.Linear(shape.dim, self.n_kv_heads)
        self.key_dim = self.head_dim + 4

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in grouped-query attention, queries and keys with four channels more.

        c is the sum of two numbers, the first with the digits of bfloat16: in half precisions and in
        TF32 one would lose its fraction. There is no gradient by c_i, as a constant added to all
        scores of a query changes no weight.
        """
        q, k, v = super().project(x, positions, cache)
        c = F.logsigmoid(self.forget(x).float()).mT.unsqueeze(-1).cumsum(dim=2)  # (B, Hkv, T, 1)
        if cache is not None and cache.state:
            c = c + cache.state[0].float().sum(dim=-1, keepdim=True)
        high = c.bfloat16().to(k.dtype)
        parts = torch.cat((high, (c - high).to(k.dtype)), dim=-1)  # (B, Hkv, T, 2)
        if cache is not None:
            cache.state = (parts[:, :, -1:].clone(),)
        mine = parts.detach().repeat_interleave(self.n_heads // self.n_kv_heads, dim=1)
        width = self.key_dim  # attention divides by its root
        one = q.new_full((1, 1, 1, 1), math.sqrt(width))
        q = torch.cat((q * math.sqrt(width / self.head_dim), mine, one.expand_as(mine)), dim=-1)
        return q, torch.cat((k, one.expand_as(parts), -parts), dim=-1), v

    # Cost

    def cache_elements(self, length: int) -> int:
        """A key with four channels more and a value per KV head and token, and the last c."""
        return super().cache_elements(length) + 2 * self.n_kv_heads

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """As its parent's; without a cache, gates of the others are computed again."""
        again = 0 if cached else 2 * self.forget.weight.numel() * length
        return super().decode_flops(length, cached=cached) + again
