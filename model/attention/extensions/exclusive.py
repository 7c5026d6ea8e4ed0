"""Exclusive self attention.

Shapes: B batch, T tokens, D dim, H query heads, Hkv KV heads, G = H / Hkv, Dh head_dim.
"""

from torch import Tensor
from torch.nn import functional as F

from model.attention.grouped import GQA
from model.shape import Shape


class ExclusiveAttention(GQA):
    """Grouped-query attention without the part of each head's output along the token's own value.

    z = y - strength (y . v) v / |v|^2, v the value of the token itself, which the residual stream
    carries anyway (XSA; Zhai 2026, https://arxiv.org/abs/2603.09078, where strength is 1). At
    strength 0 it is grouped-query attention. The first token sees nothing but itself: at strength 1
    its output is 0. No kernel is lost: the projection is elementwise work after attention.
    Costs beside its parent's: none that are counted. Raises ValueError for a strength outside 0..1.
    """

    def __init__(
        self, shape: Shape, layer: int, *, strength: float, n_kv_heads: int | None, qk_norm: bool
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        if not 0 <= strength <= 1:
            raise ValueError(f"strength={strength} must be at least 0, and at most 1")
        self.strength = strength

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        direction = F.normalize(v, dim=-1).unsqueeze(2)  # (B, Hkv, 1, T, Dh)
        y = y.unflatten(1, (self.n_kv_heads, -1))  # (B, Hkv, G, T, Dh)
        along = (y * direction).sum(dim=-1, keepdim=True)
        return (y - self.strength * along * direction).flatten(1, 2)  # (B, H, T, Dh)
