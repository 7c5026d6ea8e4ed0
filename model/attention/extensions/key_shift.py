"""Attention with shifted keys.

Shapes: B batch, T new tokens, D dim, Hkv KV heads, Dh head_dim, w shifted channels of a head.
"""

import torch
from torch import Tensor

from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.shape import Shape


class KeyShiftAttention(GQA):
    """Grouped-query attention in which the last channels of each key are those of the token before.

    A query can then match a token by the one before it, so that one layer finds what followed an
    earlier occurrence (partial key offset: modded-nanogpt,
    https://github.com/KellerJordan/modded-nanogpt/pull/169, where these channels are not rotated:
    pos=rope pos.rotary_fraction=0.5). The first token keeps its own. Channels are shifted before
    rotation. At `share` 0 it is grouped-query attention. No kernel is lost.
    Costs beside its parent's: w = share Dh cached numbers per KV head, those of the last token.
    Raises ValueError for a share outside 0..1.
    """

    def __init__(
        self, shape: Shape, layer: int, *, share: float, n_kv_heads: int | None, qk_norm: bool
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        if not 0 <= share <= 1:
            raise ValueError(f"share={share} must be at least 0, and at most 1")
        self.shifted = round(share * self.head_dim)

    def keys_values(self, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        k, v = super().keys_values(x, cache)
        own, moved = k.split((self.head_dim - self.shifted, self.shifted), dim=-1)
        before = cache.state[0] if cache is not None and cache.state else moved[:, :, :1]
        if cache is not None:
            cache.state = (moved[:, :, -1:].clone(),)  # (B, Hkv, 1, w)
        moved = torch.cat((before, moved[:, :, :-1]), dim=2)
        return torch.cat((own, moved), dim=-1), v

    def cache_elements(self, length: int) -> int:
        """As in grouped-query attention, and the shifted channels of the last key."""
        return super().cache_elements(length) + self.n_kv_heads * self.shifted
