"""Gated linear attention.

Shapes: B batch, T new tokens, D dim, H heads, Dk key_dim, Dv = head_dim.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.cache import LayerCache
from model.attention.recurrent.linear import LinearAttention
from model.ops.linear_attention import gla, without_autocast
from model.position.base import Positions
from model.shape import Shape

#: The root that is taken of the gate: it starts at 0.96, not at 0.5.
ROOT = 16
#: The lowest log gate: over the longest chunk they sum to -80, and exp(80) is still a float32.
LOWEST, LONGEST = -1.25, 64


class GLA(LinearAttention):
    """S_t = diag(a_t) S_{t-1} + k_t^T v_t and o_t = q_t S_t, with a gate for each channel of a key.

    a_t = sigmoid(x_t W_1 W_2 + b)^(1/16), W_1 (D, gate_rank): Yang et al. 2023,
    https://arxiv.org/abs/2312.06635, section 4. Here a gate is at least 0.29, which is at -20 inside
    the sigmoid, and heads are normalised by RMSNorm. `key_dim` None is half of head_dim, the paper's
    choice. Raises ValueError for widths below 1, and a chunk outside 1 to 64.
    """

    reads = 1

    def __init__(
        self, shape: Shape, layer: int, *, key_dim: int | None, gate_rank: int, chunk: int
    ) -> None:
        if gate_rank < 1:
            raise ValueError(f"gate_rank={gate_rank} must be at least 1")
        if not 1 <= chunk <= LONGEST:
            raise ValueError(f"chunk={chunk} must be from 1 to {LONGEST}")
        half = max(1, shape.head_dim // 2)
        super().__init__(shape, layer, half if key_dim is None else key_dim, chunk)
        self.forget_down = nn.Linear(shape.dim, gate_rank, bias=False)
        self.forget_up = nn.Linear(gate_rank, shape.n_heads * self.key_dim, bias=shape.bias)

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        forget = self.heads(self.forget_up(self.forget_down(x)))  # (B, H, T, Dk)
        log_gate = (F.logsigmoid(forget) / ROOT).clamp(min=LOWEST)
        (before,) = self.held(cache)
        with without_autocast(x.device.type):
            o, state = gla(q, k, v, log_gate, before, self.chunk, keep=cache is not None)
        self.keep(cache, x.size(1), state)
        return self.output(o, x)  # (B, T, D)

    # Cost

    def pair_flops(self, c: int, causal: bool) -> float:
        """q k^T and weights v."""
        return 2 * (self.key_dim + self.head_dim) * c * c * (0.5 if causal else 1.0)
