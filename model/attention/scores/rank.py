"""Attention with narrow queries and keys.

Shapes: B batch, T new tokens, D dim, H query heads, Hkv KV heads, R rank, Dh head_dim.
"""

import math

from torch import Tensor, nn

from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.position.base import Positions
from model.shape import Shape


class Rank(GQA):
    """Grouped-query attention whose queries and keys are R channels wide, and its values Dh.

    A head's scores x_j^T (W_K^T W_Q) x_t then have a matrix of rank R. `scale` multiplies them; None
    is 1 / sqrt(R), which keeps the variance of a score at 1 where queries and keys have variance 1.
    `rank` None is Dh: multi-head attention. The cache holds R + Dh numbers per KV head and token.
    `n_kv_heads` None is n_heads.
    Raises ValueError for a rank below 1, a scale that is not above 0, or n_kv_heads that does not
    divide n_heads.
    """

    def __init__(
        self,
        shape: Shape,
        layer: int,
        *,
        rank: int | None,
        scale: float | None,
        n_kv_heads: int | None,
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=False)
        self.key_dim = shape.head_dim if rank is None else rank
        if self.key_dim < 1:
            raise ValueError(
                f"rank={rank} must be at least 1, or null for head_dim={shape.head_dim}"
            )
        if scale is not None and scale <= 0:
            raise ValueError(f"scale={scale} must be above 0, or null for 1 / sqrt(rank)")
        self.q = nn.Linear(shape.dim, shape.n_heads * self.key_dim, bias=shape.bias)
        self.k = nn.Linear(shape.dim, self.n_kv_heads * self.key_dim, bias=shape.bias)
        # `attend` divides by sqrt(R)
        self.rescale = 1.0 if scale is None else scale * math.sqrt(self.key_dim)

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, positions, cache)
        return q if self.rescale == 1 else q * self.rescale, k, v
