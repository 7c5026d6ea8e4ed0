"""Multi-head, grouped-query and multi-query attention: one mechanism, three numbers of KV heads.

Shapes: B batch, T new tokens, S tokens so far, D dim, H query heads, Hkv KV heads, Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.attend import attend, choose_kernel
from model.attention.base import Bias, Rotate
from model.cache import KVCache
from model.shape import Shape, divisors


class GQA(nn.Module):
    """Attention whose H query heads share Hkv key/value heads.

    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    Raises ValueError unless n_kv_heads divides n_heads.
    """

    #: Tokens that the cache keeps: None for all.
    keep: int | None = None

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int) -> None:
        super().__init__()
        if n_kv_heads < 1 or shape.n_heads % n_kv_heads:
            raise ValueError(
                f"n_kv_heads={n_kv_heads} must divide n_heads={shape.n_heads}; "
                f"n_kv_heads that work: {divisors(shape.n_heads)}"
            )
        self.layer = layer
        self.n_heads, self.n_kv_heads, self.head_dim = shape.n_heads, n_kv_heads, shape.head_dim
        self.dropout = shape.dropout
        kv_dim = n_kv_heads * shape.head_dim
        self.q = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.k = nn.Linear(shape.dim, kv_dim, bias=shape.bias)
        self.v = nn.Linear(shape.dim, kv_dim, bias=shape.bias)
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)

    def forward(
        self, x: Tensor, pos: Tensor, rotate: Rotate, bias: Bias, cache: KVCache | None = None
    ) -> Tensor:
        q = self.heads(self.q(x), self.n_heads)  # (B, H, T, Dh)
        k = self.heads(self.k(x), self.n_kv_heads)  # (B, Hkv, T, Dh)
        v = self.heads(self.v(x), self.n_kv_heads)
        q, k = rotate(q, k, pos)
        k_pos = pos
        if cache is not None:
            k_pos, k, v = cache.append(self.layer, k, v, keep=self.keep)  # (B, Hkv, S, Dh)
        y = self.attend(q, k, v, pos, k_pos, bias)
        return self.out(y.transpose(1, 2).flatten(2))  # (B, T, D)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias
    ) -> Tensor:
        """Values by the weights that queries give to keys -> (B, H, T, Dh)."""
        return attend(q, k, v, q_pos, k_pos, bias, self.dropout if self.training else 0.0)

    def heads(self, x: Tensor, n: int) -> Tensor:
        """(B, T, n * Dh) -> (B, n, T, Dh)."""
        return x.unflatten(-1, (n, self.head_dim)).transpose(1, 2)

    def cache_elements(self, length: int) -> int:
        """A key and a value for each KV head and token."""
        return 2 * self.n_kv_heads * self.head_dim * length

    def score_flops(self, length: int, causal: bool) -> float:
        """Of q k^T and weights v, every query head against `length` keys."""
        return 4 * self.n_heads * self.head_dim * length * (0.5 if causal else 1.0)

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """Four projections, and scores and values over the token itself and those before."""
        weights = sum(p.weight.numel() for p in (self.q, self.k, self.v, self.out))
        again = 0 if cached else (self.k.weight.numel() + self.v.weight.numel()) * length
        return 2 * (weights + again) + self.score_flops(length + 1, causal=False)

    def kernel(self, device: str, dtype: torch.dtype, length: int, biased: bool) -> str:
        """The kernel that `attend` takes, given the dropout on its weights."""
        return choose_kernel(device, dtype, length, biased=biased, p=self.dropout)


class MHA(GQA):
    """Multi-head attention: every query head has its own keys and values (Vaswani et al. 2017)."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer, n_kv_heads=shape.n_heads)


class MQA(GQA):
    """Multi-query attention: one key/value head for all (Shazeer 2019, arXiv:1911.02150)."""

    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__(shape, layer, n_kv_heads=1)
