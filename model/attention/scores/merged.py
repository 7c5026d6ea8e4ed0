"""Attention with merged projections.

Shapes: B batch, T new tokens, S tokens so far, D dim, H heads, Dh head_dim.
"""

import math

from torch import Tensor, nn

from model.attention.base import Attention
from model.attention.cache import LayerCache
from model.ops.attention import attention_weights
from model.position.base import Positions
from model.shape import Shape


class Merged(Attention):
    """Attention with one matrix per head for W_Q and W_K, and one for W_V and W_O.

    Head h scores x_j^T W_h x_t / sqrt(Dh), W_h (D, D), and adds Z_h sum_j w_j x_j to the output,
    Z_h (D, D). W_h = W_K^T W_Q and Z_h = W_O W_V of a head give multi-head attention without
    rotation; other matrices have a rank above Dh. Keys and values are the input itself, so the cache
    holds D numbers a token, and scores are D channels wide. A scheme that rotates turns queries and
    inputs of width D, which is no merging of a model with RoPE: a rotation between W_Q and W_K
    cannot be merged (MLA has a rotary key of its own for that reason).
    """

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer)
        self.dim = shape.dim
        std = 0.02**2 * math.sqrt(shape.head_dim)  # of a product of two matrices N(0, 0.02)
        wide = shape.n_heads * shape.dim
        self.q = Product(shape.dim, wide, shape.bias, std)
        self.out = Product(wide, shape.dim, shape.bias, std)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.project(x, positions)
        k_pos = positions.pos
        if cache is not None:
            k_pos, v = cache.append(v)  # (B, 1, S, D)
            k = positions.scheme.rotate(v, v, k_pos)[1]  # turned again: only the input is kept
        y = self.attend(q, k, v, positions.pos, k_pos, positions.bias)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def project(self, x: Tensor, positions: Positions) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, D) and keys (B, 1, T, D), and values (B, 1, T, D): the input."""
        q = self.q(x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
        v = x.unsqueeze(1).to(q.dtype)
        q, k = positions.rotate(q, v)
        return q * math.sqrt(self.dim / self.head_dim), k, v  # `attend` divides by sqrt(D)

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        q, k, _ = self.project(x, positions)
        pos = positions.pos
        return attention_weights(q.float(), k.float(), pos, pos, positions.bias(pos, pos))

    # Cost

    @property
    def kernel_width(self) -> int:
        return self.dim

    def cache_elements(self, length: int) -> int:
        """The input of each token."""
        return self.dim * length

    def score_flops(self, length: int, causal: bool) -> float:
        """q x^T and weights x, over D channels in each head."""
        return 4 * self.n_heads * self.dim * length * (0.5 if causal else 1.0)

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """Two projections, and scores and values over inputs, which nothing has to make again."""
        weights = self.q.weight.numel() + self.out.weight.numel()
        return 2 * weights + self.score_flops(length + 1, causal=False)


class Product(nn.Linear):
    """A linear layer in place of two: its matrix starts with the spread of their product."""

    def __init__(self, inputs: int, outputs: int, bias: bool, init_std: float) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.init_std = init_std
