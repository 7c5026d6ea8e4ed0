"""Attention with a residual connection between values.

Shapes: B batch, T new tokens, D dim, Hkv KV heads, Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.position.base import Positions
from model.shape import Shape


class ValueResidualAttention(GQA):
    """Grouped-query attention whose values mix in those of the first layer: a v + b v_first.

    Two learned numbers a layer, a and b, which start at 1/2 (ResFormer; Zhou et al. 2024,
    https://arxiv.org/abs/2410.17897). At (1, 0) it is grouped-query attention. The first layer is
    the first with this mechanism; there v and v_first are the same. No kernel is lost; torch.compile
    breaks its graph at blocks that are computed again (memory=lean).
    Costs beside its parent's: two parameters; the cache holds mixed values, as many.
    Raises ValueError if the first layer has another number of KV heads.
    """

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None, qk_norm: bool) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        self.mix_bias = nn.Parameter(torch.empty(2))  # a - 1/2 and b - 1/2

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, positions, cache)
        first = positions.shared.setdefault("values", v)  # (B, Hkv, T, Dh)
        if first.size(1) != v.size(1):
            raise ValueError(
                f"n_kv_heads={v.size(1)} must be {first.size(1)}, that of the first layer, whose "
                "values are mixed in"
            )
        own, other = (self.mix_bias + 0.5).to(v.dtype)
        return q, k, own * v + other * first
