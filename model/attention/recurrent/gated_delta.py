"""The gated delta rule.

Shapes: B batch, T new tokens, D dim, H heads, Dk = Dv = head_dim, K taps of the convolution.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.cache import LayerCache
from model.attention.recurrent.linear import LinearAttention
from model.ops.linear_attention import delta, padded, without_autocast
from model.position.base import Positions
from model.shape import Shape

#: Decay at the start of training: softplus(SHIFT) = 0.01 a token, times FASTEST in the last head.
SHIFT, FASTEST = math.log(math.expm1(0.01)), 16.0


class GatedDelta(LinearAttention):
    """S_t = a_t (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t and o_t = q_t S_t: Gated DeltaNet.

    Yang et al. 2024, https://arxiv.org/abs/2412.06464: the state forgets by a_t, then the value at
    key k_t moves by b_t = sigmoid(x_t W_b) towards v_t. q, k and v pass through a convolution over the
    last `conv` tokens (1 for none) and swish, and q and k are normalised to length 1. As in Mamba-2,
    a_t = exp(-A softplus(x_t W_a + d)) per head; A starts at 1 to 16, evenly. Widths are those of
    multi-head attention. Raises ValueError for a chunk or a convolution below 1.
    """

    reads = 2

    def __init__(self, shape: Shape, layer: int, *, conv: int, chunk: int) -> None:
        super().__init__(shape, layer, shape.head_dim, chunk)
        if conv < 1:
            raise ValueError(f"conv={conv} must be at least 1, which is no convolution")
        self.forget = nn.Linear(shape.dim, shape.n_heads, bias=False)
        self.forget_bias = nn.Parameter(torch.zeros(shape.n_heads))  # d, less SHIFT
        self.decay_bias = nn.Parameter(torch.zeros(shape.n_heads))  # log A, less that of its start
        self.rate = nn.Linear(shape.dim, shape.n_heads, bias=shape.bias)
        self.taps = nn.Parameter(torch.zeros(conv, 3 * shape.dim))  # less 1 for the token itself

    def forward(self, x: Tensor, positions: Positions, cache: LayerCache | None = None) -> Tensor:
        before, memory = self.held(cache)
        qkv = torch.cat((self.q(x), self.k(x), self.v(x)), dim=-1)  # (B, T, 3 D)
        qkv, before = self.convolved(qkv, before)
        q, k, v = (self.heads(part) for part in F.silu(qkv).chunk(3, dim=-1))  # (B, H, T, Dh)
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        log_gate, rate = self.log_gate(x), self.rate(x).float().sigmoid().mT  # (B, H, T)
        with without_autocast(x.device.type):
            o, state = delta(q, k, v, log_gate, rate, memory, self.chunk, cache is not None)
        self.keep(cache, x.size(1), before, state)
        return self.output(o, x)  # (B, T, D)

    def convolved(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, T, C) plus the weighted tokens up to K - 1 before each; and the last K - 1 of all."""
        T, taps = x.size(1), self.taps.to(x.dtype)
        if before is None:
            read = F.pad(x, (0, 0, len(taps) - 1, 0))  # (B, K - 1 + T, C)
        else:
            read = torch.cat((before.to(x.dtype), x), dim=1)
        for back, tap in enumerate(taps):
            end = read.size(1) - back
            x = x + tap * read[:, end - T : end]
        return x, read[:, T:]

    def log_gate(self, x: Tensor) -> Tensor:
        """log a (B, H, T), float32."""
        start = torch.linspace(1, FASTEST, self.n_heads, device=x.device)
        forget = self.forget(x).float() + self.forget_bias + SHIFT  # (B, T, H)
        return -(start * self.decay_bias.exp() * F.softplus(forget)).mT

    def state_shapes(self) -> list[tuple[int, ...]]:
        return [(len(self.taps) - 1, self.taps.size(1)), *super().state_shapes()]

    # Cost

    def pair_flops(self, c: int, causal: bool) -> float:
        """k k^T, q k^T, the inverse times values, weights times those; and the inverse."""
        pairs = 4 * (self.key_dim + self.head_dim) * c * c * (0.5 if causal else 1.0)
        size = padded(c)
        return pairs + 2 * size * (size * size - 4) // 3
