"""Differential attention, second version.

Shapes: B batch, T queries, S keys, D dim, H heads, Hkv KV heads, Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.base import Attention
from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.ops.attention import Bias
from model.position.base import Positions
from model.shape import Shape


class DifferentialAttention(GQA):
    """Grouped-query attention in which each head subtracts a second query's attention from its own.

    y = y_1 - sigmoid(L x) y_2, where both queries of a head share its key and value and L x is one
    number per token and head (Ye et al. 2026, https://huggingface.co/blog/microsoft/diff-attn-v2).
    At sigmoid(L x) = 0 it is grouped-query attention; it starts near 1/2. Twice the queries in one
    call: no kernel is lost. The difference of two softmaxes may be negative, so there are no
    `weights` to analyse.
    Costs beside its parent's: D^2 + D H weights, as many scores again; no cache.
    """

    weights = Attention.weights

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None, qk_norm: bool) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        self.q_subtracted = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.subtracted = nn.Linear(shape.dim, shape.n_heads, bias=shape.bias)

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As in grouped-query attention, with the two queries of a head side by side: 2 H in all."""
        both = [self.heads(q(x), self.n_heads) for q in (self.q, self.q_subtracted)]
        q = torch.stack(both, dim=2).flatten(1, 2)  # (B, 2 H, T, Dh)
        k, v = self.keys_values(x, cache)
        return *positions.rotate(self.q_norm(q), k), v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        def doubled(q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
            added = bias(q_pos, k_pos)  # (H, T, S)
            return None if added is None else added.repeat_interleave(2, dim=0)

        return super().attend(q, k, v, q_pos, k_pos, doubled)

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        share = torch.sigmoid(self.subtracted(x)).transpose(1, 2).unsqueeze(-1)  # (B, H, T, 1)
        return y[:, 0::2] - share * y[:, 1::2]  # (B, H, T, Dh)

    @property
    def pair_flops(self) -> int:
        """FLOPs of both queries of every head with one key."""
        return 2 * super().pair_flops
