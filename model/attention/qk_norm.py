"""Grouped-query attention with query-key normalisation.

Shapes: B batch, T new tokens, D dim.
"""

from torch import Tensor

from model.attention.base import Bias, Rotate
from model.attention.grouped import GQA
from model.cache import KVCache
from model.norm import RMSNorm
from model.shape import Shape


class QKNorm(GQA):
    """Each query and key has RMS 1, times a learned weight a channel, before positions turn it.

    So no score grows beyond what the weights allow, and higher learning rates stay stable: Henry et
    al. 2020, https://arxiv.org/abs/2010.04245, in the form of Qwen3, whose weights all heads share.
    `n_kv_heads` None is n_heads.
    """

    def __init__(self, shape: Shape, layer: int, *, n_kv_heads: int | None) -> None:
        super().__init__(
            shape, layer, n_kv_heads=shape.n_heads if n_kv_heads is None else n_kv_heads
        )
        self.q_norm = RMSNorm(shape.head_dim, shape.bias)
        self.k_norm = RMSNorm(shape.head_dim, shape.bias)

    def forward(
        self, x: Tensor, pos: Tensor, rotate: Rotate, bias: Bias, cache: KVCache | None = None
    ) -> Tensor:
        def normed(q: Tensor, k: Tensor, pos: Tensor) -> tuple[Tensor, Tensor]:
            return rotate(self.q_norm(q), self.k_norm(k), pos)

        return super().forward(x, pos, normed, bias, cache)
