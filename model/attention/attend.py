"""softmax(q k^T / sqrt(Dh) + bias) v under the causal mask: the only place that calls a kernel.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, G = H / Hkv, Dh head_dim, Dv width
of values.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.base import Bias
from model.dropout import dropout


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias, p: float = 0.0
) -> Tensor:
    """Causal attention of q (B, H, T, Dh) over k (B, Hkv, S, Dh) and v (B, Hkv, S, Dv).

    Returns (B, H, T, Dv). Query i sees the keys with k_pos <= q_pos[i]. `bias(q_pos, k_pos)` is added to the scores;
    `p` is dropout on the weights, for training. Keys are never copied out to H heads where the
    kernel can avoid it. Which kernel, `choose_kernel` says.
    """
    added = bias(q_pos, k_pos)
    kernel = choose_kernel(q.device.type, q.dtype, k.size(2), biased=added is not None, p=p)
    if kernel == "matmul":
        return matmul(q, k, v, q_pos, k_pos, added, p)
    mask = None
    if added is not None or q.size(2) != k.size(2):
        mask = causal_mask(q_pos, k_pos, q.dtype)
        mask = mask if added is None else mask + added.to(q.dtype)
    shared = kernel == "flash"  # other fused kernels take no grouped heads
    if not shared and k.size(1) != q.size(1):
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    width = v.size(-1)
    if width != k.size(-1):
        v = F.pad(v, (0, k.size(-1) - width))  # fused kernels take one width alone
    y = F.scaled_dot_product_attention(
        q, k, v, mask, dropout_p=p, is_causal=mask is None, enable_gqa=k.size(1) != q.size(1)
    )
    return y[..., :width]


def choose_kernel(device: str, dtype: torch.dtype, length: int, *, biased: bool, p: float) -> str:
    """The fastest correct kernel for keys of this length, whatever the mechanism.

    `matmul` is ours: two products around a softmax. `flash` and `sdpa` are torch's fused kernels,
    `sdpa` with the KV heads copied out, because there they take no grouped heads.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device == "cpu":  # flash's backward is slow in bfloat16; measured crossing points
        return "matmul" if biased or p > 0 or length <= (1024 if half else 512) else "flash"
    return "flash" if device == "cuda" and half and not biased else "sdpa"


def matmul(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, added: Tensor | None, p: float
) -> Tensor:
    """Attention as two batched products; the G queries of a KV head share one product with it."""
    B, H, T, Dh = q.shape
    Hkv, S = k.shape[1:3]
    G = H // Hkv
    q = (q * (1 / math.sqrt(Dh))).reshape(B * Hkv, G * T, Dh)
    k = k.reshape(B * Hkv, S, Dh)
    v = v.reshape(B * Hkv, S, v.size(-1))
    mask = causal_mask(q_pos, k_pos, q.dtype).repeat(G, 1)  # (G * T, S)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2))  # (B * Hkv, G * T, S)
    if added is not None:
        scores = scores.view(B, H, T, S) + added.to(scores.dtype)
    weights = dropout(scores.softmax(dim=-1), p, training=p > 0)
    return torch.bmm(weights.view(B * Hkv, G * T, S), v).view(B, H, T, -1)


def causal_mask(q_pos: Tensor, k_pos: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, -inf where the key lies ahead: (T, S)."""
    ahead = k_pos > q_pos[:, None]
    return torch.zeros(ahead.shape, dtype=dtype, device=ahead.device).masked_fill_(ahead, -math.inf)
