"""Attention with learned sinks.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.grouped import GQA
from model.ops.attention import Bias, causal_mask, grouped_scores, softmax, weighted_values
from model.position.base import Positions
from model.shape import Shape


class SinkAttention(GQA):
    """Grouped-query attention with a learned logit s_h per head in the softmax's denominator.

    weights_ij = exp(score_ij) / (exp(s_h) + sum_j exp(score_ij)), so that a head may attend to
    nothing (gpt-oss, https://arxiv.org/abs/2508.10925). As s_h falls to -inf it is grouped-query
    attention; s_h starts at 0. The sink is a key before the first, with a zero value, which scores
    s_h through a further channel of queries and keys; so every kernel serves. Decoding, one query at
    a time, adds it to the scores instead and copies no cached key.
    Costs beside its parent's: H parameters; outside decoding, one row, column and channel of the
    scores; no cache.
    """

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None, qk_norm: bool) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        self.sink_bias = nn.Parameter(torch.empty(shape.n_heads))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        if q.size(2) == 1:
            weights = self.token_weights(q, k, q_pos, k_pos, bias(q_pos, k_pos))
            return weighted_values(weights, v, self.dropout if self.training else 0.0)
        first = int(q.size(2) == k.size(2))  # a query for the sink: fused kernels require a square
        width = self.head_dim + 1

        def padded(q_pos: Tensor, k_pos: Tensor) -> Tensor | None:
            added = bias(q_pos[first:], k_pos[1:])
            return None if added is None else F.pad(added, (1, 0, first, 0))

        sink = self.sinks(q)  # (B, H, T, 1)
        q = torch.cat((q * math.sqrt(width / self.head_dim), sink), dim=-1)
        key = F.pad(k.new_full((*k.shape[:2], 1, 1), math.sqrt(width)), (self.head_dim, 0))
        k = torch.cat((key, F.pad(k, (0, 1))), dim=2)  # (B, Hkv, 1 + S, Dh + 1)
        q, v = F.pad(q, (0, 0, first, 0)), F.pad(v, (0, 0, 1, 0))
        q_pos, k_pos = F.pad(q_pos, (first, 0), value=-1), F.pad(k_pos, (1, 0), value=-1)
        y = super().attend(q, k, v, q_pos, k_pos, padded)
        return y[:, :, first:]

    def sinks(self, q: Tensor) -> Tensor:
        """The sink's score for each query of q (B, H, T, Dh): (B, H, T, 1)."""
        return self.sink_bias.to(q.dtype)[:, None, None].expand(*q.shape[:3], 1)

    def token_weights(
        self, q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None
    ) -> Tensor:
        """Attention weights (B, H, T, S), without the sink's: they sum to less than 1."""
        scores = grouped_scores(q, k) + causal_mask(q_pos, k_pos, q.dtype)
        scores = scores if bias is None else scores + bias.to(q.dtype)
        return softmax(torch.cat((scores, self.sinks(q)), dim=-1))[..., :-1].contiguous()

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        q, k, _ = self.project(x, positions)
        pos = positions.pos
        return self.token_weights(q.float(), k.float(), pos, pos, positions.bias(pos, pos))

    def score_flops(self, length: int, causal: bool) -> float:
        """As its parent's for visible pairs; with the sink's row, column and channel for all."""
        if causal or length == 1:
            return super().score_flops(length, causal)
        return 2 * self.n_heads * (2 * self.head_dim + 1) * (length + 1) ** 2 / length

    @property
    def kernel_width(self) -> int:
        """With the channel of the sink's score."""
        return super().kernel_width + 1

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        return super().kernel(device, dtype, length + 1, biased)
