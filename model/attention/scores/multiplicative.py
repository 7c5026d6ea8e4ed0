"""Multiplicative attention scores.

Shapes: B batch, T new tokens, D dim, H query heads, Hkv KV heads, Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.base import weight_of
from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.position.base import Positions
from model.shape import Shape


class Multiplicative(GQA):
    """Grouped-query attention with the score k^T W q / sqrt(Dh), one matrix W per query head.

    Luong et al. 2015, https://arxiv.org/abs/1508.04025 (their `general` score). W = I + a drawn
    matrix, so that training starts near the dot product. W q comes before rotation, so RoPE scores
    depend on i - j alone. W times the query projection is a query projection again: multi-head
    attention computes the same functions, with H Dh^2 fewer parameters.
    `n_kv_heads` None is n_heads. Raises ValueError unless n_kv_heads divides n_heads.
    """

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=False)
        self.score = nn.Linear(shape.head_dim, shape.dim, bias=False)  # W - I of all heads

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = self.heads(self.q(x), self.n_heads)
        k, v = self.keys_values(x, cache)
        W = weight_of(self.score).unflatten(0, (self.n_heads, -1))  # (H, Dh, Dh)
        q = q + torch.einsum("bhtd,hed->bhte", q, W)
        return *positions.rotate(q, k), v
