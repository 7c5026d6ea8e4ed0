"""Additive attention scores.

Shapes: B batch, T queries, S keys, D dim, H query heads, Hkv KV heads, G = H / Hkv, Dh head_dim,
ds width of the scores.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention.cache import LayerCache
from model.attention.grouped import GQA
from model.ops.attention import Bias, masked_softmax, weighted_values
from model.position.base import Positions
from model.shape import Shape

#: Queries per block: all blocks of a long text at once would make B H T S ds numbers.
BLOCK = 8


class Additive(GQA):
    """Grouped-query attention with the score w . tanh(W_k k + W_q q), one vector w per query head.

    Bahdanau et al. 2015, https://arxiv.org/abs/1409.0473. W_k and W_q only follow projections, so
    keys and queries are projected straight to ds channels. Without biases (`model.bias`) the score is
    odd in (k, q), so no width makes it the angle between them. The score is not scaled. A scheme that
    rotates turns both by their absolute positions: the score is no function of i - j alone.
    No kernel fuses it: blocks of queries meet the keys up to their own end, and the tanh is computed
    again in the backward pass. FLOPs count products, not the tanh, which takes most of the time.
    `width` is ds, None for Dh; `n_kv_heads` None is n_heads.
    Raises ValueError for a width below 1, or n_kv_heads that does not divide n_heads.
    """

    own_kernel = "scores"  # torch's multiply queries and keys

    def __init__(
        self, shape: Shape, layer: int, *, width: int | None, n_kv_heads: int | None
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=False)
        self.key_dim = shape.head_dim if width is None else width
        if self.key_dim < 1:
            raise ValueError(
                f"width={width} must be at least 1, or null for head_dim={shape.head_dim}"
            )
        self.q = nn.Linear(shape.dim, shape.n_heads * self.key_dim, bias=shape.bias)
        self.k = nn.Linear(shape.dim, self.n_kv_heads * self.key_dim, bias=shape.bias)
        self.w = nn.Parameter(torch.empty(shape.n_heads, self.key_dim))

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x, positions, cache)
        return q.contiguous(), k.contiguous(), v  # their sums, far larger, are laid out like them

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        p = self.dropout if self.training else 0.0
        T, S = q.size(2), k.size(2)
        blocks = []
        for start in range(0, T, BLOCK):
            end = min(start + BLOCK, T)
            seen = S - T + end  # keys that the block's last query sees
            scores = self.scores(q[:, :, start:end], k[:, :, :seen])  # (B, H, BLOCK, seen)
            now, past = q_pos[start:end], k_pos[:seen]
            weights = masked_softmax(scores, now, past, bias(now, past))
            blocks.append(weighted_values(weights, v[:, :, :seen], p))
        return torch.cat(blocks, dim=2)  # (B, H, T, Dh)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Scores of q (B, H, T, ds) and k (B, Hkv, S, ds): (B, H, T, S)."""
        inputs = (q, k, self.w.to(q.dtype))
        if not torch.is_grad_enabled():
            return additive_scores(*inputs)
        again: Tensor = checkpoint(
            additive_scores, *inputs, use_reentrant=False, preserve_rng_state=False
        )
        return again

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        q, k, _ = (part.float() for part in self.project(x, positions))
        scores = torch.cat([self.scores(block, k) for block in q.split(BLOCK, dim=2)], dim=2)
        pos = positions.pos
        return masked_softmax(scores, pos, pos, positions.bias(pos, pos))

    # Cost

    def score_flops(self, length: int, causal: bool) -> float:
        """w . tanh and weights times values; unless `causal`, all pairs of the blocks."""
        ends = [min(start + BLOCK, length) for start in range(0, length, BLOCK)]
        pairs = sum(end * (end - i * BLOCK) for i, end in enumerate(ends))
        return self.pair_flops * (length / 2 if causal else pairs / length)


def additive_scores(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    """w . tanh(k + q) of all pairs of q (B, H, T, ds) and k (B, Hkv, S, ds), w (H, ds): (B, H, T, S)."""
    B, H, T, ds = q.shape
    Hkv, S = k.shape[1:3]
    q, k = q.view(B, Hkv, H // Hkv, T, 1, ds), k.view(B, Hkv, 1, 1, S, ds)
    hidden = (k + q).tanh_()  # (B, Hkv, G, T, S, ds)
    # the product last: what is computed again in the backward pass then ends before it
    return (hidden.view(B, H, T * S, ds) @ w.unsqueeze(-1)).view(B, H, T, S)
