"""Multi-head, grouped-query and multi-query attention: one mechanism, three numbers of KV heads.

Shapes: B batch, T new tokens, S tokens so far, D dim, H query heads, Hkv KV heads, Dh head_dim.
"""

from torch import Tensor, nn

from model.attention.base import Attention
from model.attention.cache import LayerCache
from model.ops.attention import Bias, attention_weights
from model.ops.norm import RMSNorm
from model.position.base import Positions
from model.shape import Shape, divisors


class GQA(Attention):
    """Grouped-query attention: H query heads share Hkv key/value heads.

    Ainslie et al. 2023, https://arxiv.org/abs/2305.13245. With `qk_norm`, queries and keys are
    RMS-normalised per head before rotation, with one learned weight per channel that all heads
    share (Henry et al. 2020, https://arxiv.org/abs/2010.04245, as in Qwen3). `n_kv_heads` None is
    n_heads. Raises ValueError unless n_kv_heads divides n_heads.
    """

    n_kv_heads: int

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None, qk_norm: bool) -> None:
        super().__init__(shape, layer)
        self.n_kv_heads = kv_heads(shape, n_kv_heads)
        kv_dim = self.n_kv_heads * shape.head_dim
        self.q = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.k = nn.Linear(shape.dim, kv_dim, bias=shape.bias)
        self.v = nn.Linear(shape.dim, kv_dim, bias=shape.bias)
        self.out = nn.Linear(shape.dim, shape.dim, bias=shape.bias)
        self.q_norm = RMSNorm(shape.head_dim, shape.bias) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(shape.head_dim, shape.bias) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.project(x, positions, cache)
        k_pos, keys, values = positions.pos, k, v
        if cache is not None:
            k_pos, keys, values = cache.append(k, v)  # (B, Hkv, S, Dh)
        if self.prefix is not None:
            k_pos, keys, values = self.prefix(k_pos, keys, values)
        y = self.attend(q, keys, values, positions.pos, k_pos, positions.bias)
        return self.out(self.finish(y, x, v).transpose(1, 2).flatten(2))  # (B, T, D)

    def project(
        self, x: Tensor, positions: Positions, cache: LayerCache | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries (B, H, T, Dh) and keys (B, Hkv, T, Dh), and values (B, Hkv, T, Dh)."""
        q = self.q_norm(self.heads(self.q(x), self.n_heads))
        k, v = self.keys_values(x, cache)
        return *positions.rotate(q, k), v

    def cross(self, x: Tensor, positions: Positions, y: Tensor, y_positions: Positions) -> Tensor:
        q = self.q_norm(self.heads(self.q(x), self.n_heads))
        k, v = self.keys_values(y, None)
        q, _ = positions.rotate(q, q[:, :1])  # places of a query and of a key, one of them too many
        _, k = y_positions.rotate(k[:, :1], k)
        seen = self.attend(q, k, v, positions.pos, y_positions.pos, positions.bias)
        return self.out(seen.transpose(1, 2).flatten(2))

    @property
    def crosses(self) -> bool:
        own = (type(self).project, type(self).finish)  # which `cross` would leave out
        return self.takes_prefix and own == (GQA.project, GQA.finish)

    def keys_values(self, x: Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """Keys before rotation and values, each (B, Hkv, T, Dh); x follows the tokens of the cache."""
        k = self.heads(self.k(x), self.n_kv_heads)
        return self.k_norm(k), self.heads(self.v(x), self.n_kv_heads)

    @property
    def takes_prefix(self) -> bool:
        """As long as a subclass neither reads keys elsewhere, nor hides any, nor has wider ones."""
        own = (type(self).forward, type(self).attend)
        return own == (GQA.forward, Attention.attend) and self.key_dim == self.head_dim

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        """The heads' output (B, H, T, Dh) as `out` takes it; here y, what attention returned.

        x (B, T, D) is the input of the layer, v (B, Hkv, T, Dh) the values of the same tokens.
        """
        return y

    def weights(self, x: Tensor, positions: Positions) -> Tensor:
        q, k, _ = self.project(x, positions)
        pos = positions.pos
        return attention_weights(
            q.float(), k.float(), pos, pos, self.within(positions.bias)(pos, pos)
        )

    def within(self, bias: Bias) -> Bias:
        """The bias, and -inf for keys that this attention does not see; here it sees them all."""
        return bias

    def heads(self, x: Tensor, n: int) -> Tensor:
        """(B, T, n * Dh) -> (B, n, T, Dh), whatever the width Dh."""
        return x.unflatten(-1, (n, -1)).transpose(1, 2)

    # Cost

    def cache_elements(self, length: int) -> int:
        """One key and one value per KV head and token."""
        return self.n_kv_heads * (self.key_dim + self.head_dim) * length

    @property
    def pair_flops(self) -> int:
        """FLOPs of a query of every head with one key: q k^T and weights v."""
        return 2 * self.n_heads * (self.key_dim + self.head_dim)

    def score_flops(self, length: int, causal: bool) -> float:
        """Every query against `length` keys."""
        return self.pair_flops * length * (0.5 if causal else 1.0)

    def decode_flops(self, length: int, *, cached: bool = True) -> float:
        """All projections, and scores and values over the token itself and those before."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        again = 0 if cached else (self.k.weight.numel() + self.v.weight.numel()) * length
        return 2 * (weights + again) + self.pair_flops * (length + 1)


def kv_heads(shape: Shape, asked: int | None) -> int:
    """The number of KV heads asked for, n_heads for None. Raises ValueError unless it divides n_heads."""
    number = shape.n_heads if asked is None else asked
    if number < 1 or shape.n_heads % number:
        raise ValueError(
            f"n_kv_heads={number} must divide n_heads={shape.n_heads}; "
            f"n_kv_heads that work: {divisors(shape.n_heads)}"
        )
    return number


class MHA(GQA):
    """Multi-head attention: one key/value head per query head (Vaswani et al. 2017)."""

    def __init__(self, shape: Shape, layer: int, *, qk_norm: bool) -> None:
        super().__init__(shape, layer, n_kv_heads=None, qk_norm=qk_norm)


class MQA(GQA):
    """Multi-query attention: one key/value head for all (Shazeer 2019, arXiv:1911.02150)."""

    def __init__(self, shape: Shape, layer: int, *, qk_norm: bool) -> None:
        super().__init__(shape, layer, n_kv_heads=1, qk_norm=qk_norm)
