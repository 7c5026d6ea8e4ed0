"""Concatenated attention scores.

Shapes: B batch, T new tokens, S tokens so far, D dim, H query heads, Hkv KV heads, G = H / Hkv,
Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.base import Attention, weight_of
from model.attention.cache import LayerCache
from model.attention.grouped import kv_heads
from model.ops.attention import masked_softmax, weighted_values
from model.position.base import Positions
from model.shape import Shape


class Concatenated(Attention):
    """Attention with the score w . [k; q] of a linear layer, one vector w per query head.

    The query's half of w adds the same number to all scores of a query, and softmax takes it away:
    every query weighs the keys in the same way. So there are no queries here, and the score of a key
    is w . k. The cache keeps it, beside the value. A scheme that rotates turns the key before, by
    its absolute position. The score is not scaled.
    `n_kv_heads` None is n_heads. Raises ValueError unless n_kv_heads divides n_heads.
    """

    own_kernel = "scores"  # torch's multiply queries and keys
    n_kv_heads: int

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None) -> None:
        super().__init__(shape, layer)
        self.n_kv_heads = kv_heads(shape, n_kv_heads)
        kv_dim = self.n_kv_heads * shape.head_dim
        self.k = nn.Linear(shape.dim, kv_dim, bias=shape.bias)
        self.v = nn.Linear(shape.dim, kv_dim, bias=shape.bias)
        self.score = nn.Linear(shape.head_dim, shape.n_heads, bias=False)  # w of each head
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        scores, v = self.project(x, positions)
        k_pos = positions.pos
        if cache is not None:
            k_pos, scores, v = cache.append(scores, v)
        bias = positions.bias(positions.pos, k_pos)
        weights = masked_softmax(scores.mT, positions.pos, k_pos, bias)  # (B, H, T, S)
        y = weighted_values(weights, v, self.dropout if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor]:
        """Scores (B, H, T, 1) of the keys, and values (B, Hkv, T, Dh)."""
        k, v = (
            part(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
            for part in (self.k, self.v)
        )
        _, k = positions.rotate(k, k)
        w = weight_of(self.score).unflatten(0, (self.n_kv_heads, -1))  # (Hkv, G, Dh)
        return torch.einsum("bktd,kgd->bkgt", k, w).flatten(1, 2).unsqueeze(-1), v

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        scores, pos = self.project(x, positions)[0], positions.pos
        return masked_softmax(scores.float().mT, pos, pos, positions.bias(pos, pos))

    # Cost

    def cache_elements(self, length: int) -> int:
        """One value per KV head and one score per query head, for each token."""
        return (self.n_kv_heads * self.head_dim + self.n_heads) * length

    def score_flops(self, length: int, causal: bool) -> float:
        """Weights times values: the scores are made once per key, with the projections."""
        return 2 * self.n_heads * self.head_dim * length * (0.5 if causal else 1.0)

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """The projections and the score of the token, and values over it and those before."""
        made = sum(p.weight.numel() for p in (self.k, self.v, self.score))
        again = 0 if cached else made * length
        weights = made + self.out.weight.numel() + again
        return 2 * weights + self.score_flops(length + 1, causal=False)
