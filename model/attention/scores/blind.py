"""Attention that does not read its tokens to weigh them.

Shapes: B batch, T new tokens, S tokens so far, D dim, H heads, Hkv value heads, G = H / Hkv,
Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.base import Attention
from model.attention.cache import LayerCache
from model.attention.grouped import kv_heads
from model.ops.attention import Bias, masked_softmax, weighted_values
from model.position.base import Positions
from model.shape import Shape


class Blind(Attention):
    """Attention without queries and keys: weights softmax(bias) of positions alone, for every text.

    Without a bias a head is the mean of the past, with ALiBi an exponential memory, with T5 a learned
    filter, and with sharp Gaussian positions a causal convolution whose taps are the heads (Cordonnier
    et al. 2020, https://arxiv.org/abs/1911.03584). The weights are computed once for a batch, and the
    cache holds values. Schemes that rotate have nothing to rotate here and are refused.
    `n_kv_heads` None is n_heads. Raises ValueError unless n_kv_heads divides n_heads.
    """

    own_kernel = "scores"  # torch's multiply queries and keys
    n_kv_heads: int
    heeds = frozenset({"embed", "bias"})

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None) -> None:
        super().__init__(shape, layer)
        self.n_kv_heads = kv_heads(shape, n_kv_heads)
        self.v = nn.Linear(shape.dim, self.n_kv_heads * shape.head_dim, bias=shape.bias)
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        v = self.v(x).unflatten(-1, (self.n_kv_heads, -1)).transpose(1, 2)
        k_pos = positions.pos
        if cache is not None:
            k_pos, v = cache.append(v)  # (B, Hkv, S, Dh)
        weights = self.of_positions(positions.pos, k_pos, positions.bias).to(v.dtype)
        y = self.weigh(weights, v)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def of_positions(self, q_pos: Tensor, k_pos: Tensor, bias: Bias) -> Tensor:
        """Attention weights (H, T, S), float32."""
        nothing = torch.zeros(self.n_heads, len(q_pos), len(k_pos), device=q_pos.device)
        return masked_softmax(nothing, q_pos, k_pos, bias(q_pos, k_pos))

    def weigh(self, weights: Tensor, v: Tensor) -> Tensor:
        """Weights (H, T, S) times values (B, Hkv, S, Dh): (B, H, T, Dh)."""
        B, Hkv, S, Dh = v.shape
        if self.training and self.dropout > 0:  # each text drops weights of its own
            return weighted_values(weights.expand(B, -1, -1, -1), v, self.dropout)
        v = v.permute(1, 2, 0, 3).reshape(Hkv, S, B * Dh)  # one product for all texts
        y = torch.bmm(weights.reshape(Hkv, -1, S), v)  # (Hkv, G * T, B * Dh)
        return y.view(self.n_heads, -1, B, Dh).permute(2, 0, 1, 3)

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        pos = positions.pos
        return self.of_positions(pos, pos, positions.bias).expand(x.size(0), -1, -1, -1)

    # Cost

    def cache_elements(self, length: int) -> int:
        """One value per value head and token."""
        return self.n_kv_heads * self.head_dim * length

    def score_flops(self, length: int, causal: bool) -> float:
        """Weights times values."""
        return 2 * self.n_heads * self.head_dim * length * (0.5 if causal else 1.0)

    def score_backward(self, trains_bias: bool) -> int:
        """The gradient of the values, and of the weights only where they have parameters."""
        return 2 if trains_bias else 1

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """Two projections, and values over the token itself and those before."""
        again = 0 if cached else self.v.weight.numel() * length
        weights = self.v.weight.numel() + self.out.weight.numel() + again
        return 2 * weights + self.score_flops(length + 1, causal=False)
