"""Gated attention.

Shapes: B batch, T new tokens, D dim, H query heads, Hkv KV heads, Dh head_dim.
"""

import torch
from torch import Tensor, nn

from model.attention.grouped import GQA
from model.shape import Shape

GATES = ("head", "element")


class GatedAttention(GQA):
    """Grouped-query attention whose heads' output is multiplied by sigmoid(W x), x the layer's input.

    Qiu et al. 2025, https://arxiv.org/abs/2505.06708 (G1, as in Qwen3-Next). `gate` head has one gate
    a head, element one a channel. At gate 1 it is grouped-query attention; it starts near 1/2. No
    kernel is lost: the gate is elementwise work after attention.
    Costs beside its parent's: D H weights (head) or D^2 (element), which each token is multiplied
    with once; no cache. Raises ValueError for another `gate`.
    """

    def __init__(
        self, shape: Shape, layer: int, *, gate: str, n_kv_heads: int | None, qk_norm: bool
    ) -> None:
        super().__init__(shape, layer, n_kv_heads=n_kv_heads, qk_norm=qk_norm)
        if gate not in GATES:
            raise ValueError(f"gate={gate} must be one of {', '.join(GATES)}")
        gates = shape.n_heads if gate == "head" else shape.dim
        self.gate = nn.Linear(shape.dim, gates, bias=shape.bias)

    def finish(self, y: Tensor, x: Tensor, v: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(x)).unflatten(-1, (self.n_heads, -1))  # (B, T, H, 1 or Dh)
        return y * gate.transpose(1, 2)  # (B, H, T, Dh)
