"""Kernels of causal attention: a reference, two matrix products, and torch's fused kernels.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, G = H / Hkv, Dh head_dim, Dv width
of values. A bias is added to the scores: (T, S) or (H, T, S).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from model.ops.dropout import drop

#: Given the positions (T,) of queries and (S,) of keys: the bias, or None for none.
Bias = Callable[[Tensor, Tensor], Tensor | None]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None
) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + bias) v over keys with k_pos <= q_pos: (B, H, T, Dv)."""
    group = q.size(1) // k.size(1)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = q @ k.mT / math.sqrt(q.size(-1)) + (0 if bias is None else bias)
    return scores.masked_fill(k_pos > q_pos[:, None], -math.inf).softmax(dim=-1) @ v


def causal_mask(q_pos: Tensor, k_pos: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, -inf where the key lies ahead: (T, S)."""
    ahead = k_pos > q_pos[:, None]
    return torch.zeros(ahead.shape, dtype=dtype, device=ahead.device).masked_fill_(ahead, -math.inf)


def attention_weights(
    q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None
) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + bias), the G queries of a KV head in one product: (B, H, T, S).

    Few passes over memory: the scale goes into q, the mask into the product.
    """
    B, H, T, Dh = q.shape
    Hkv, S = k.shape[1:3]
    G = H // Hkv
    q = (q * (1 / math.sqrt(Dh))).reshape(B * Hkv, G * T, Dh)
    k = k.reshape(B * Hkv, S, Dh)
    if T == 1:  # one query sees all keys
        scores = torch.bmm(q, k.transpose(1, 2))  # (B * Hkv, G, S)
    else:
        mask = causal_mask(q_pos, k_pos, q.dtype)
        if bias is not None and bias.dim() == 2:  # the same for all heads: part of the mask
            mask, bias = mask + bias.to(mask.dtype), None
        scores = torch.baddbmm(mask.repeat(G, 1), q, k.transpose(1, 2))  # (B * Hkv, G * T, S)
    scores = scores.view(B, H, T, S)
    scores = scores if bias is None else scores + bias.to(scores.dtype)
    # On a CPU, softmax of such short rows is slower in bfloat16 than in float32.
    exact = torch.float32 if S < 32 and scores.dtype == torch.bfloat16 else None
    return scores.softmax(dim=-1, dtype=exact).to(scores.dtype)


def matmul_attention(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None, p: float
) -> Tensor:
    """Attention as two batched products, with dropout p on the weights: (B, H, T, Dv)."""
    B, H, T, _ = q.shape
    Hkv, S = k.shape[1:3]
    weights = attention_weights(q, k, q_pos, k_pos, bias)
    if p > 0:
        weights, scale = drop(weights, p)
        v = v * scale  # fewer numbers than the weights
    v = v.reshape(B * Hkv, S, v.size(-1))
    return torch.bmm(weights.view(B * Hkv, -1, S), v).view(B, H, T, -1)


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    p: float,
    *,
    is_causal: bool,
    copy_heads: bool,
) -> Tensor:
    """torch's fused kernels: (B, H, T, Dv). `copy_heads` for those that take no grouped KV heads."""
    if copy_heads and k.size(1) != q.size(1):
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    width = v.size(-1)
    if width != k.size(-1):
        v = F.pad(v, (0, k.size(-1) - width))  # they take values as wide as keys only
    if mask is not None and mask.dim() == 3:
        mask = mask[None]  # with three dimensions torch falls back to its slow kernel
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout_p=p,
        is_causal=is_causal,
        enable_gqa=k.size(1) != q.size(1),
    )
    return y[..., :width]
