"""Kernels of causal attention: a reference, two matrix products, and torch's fused kernels.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, G = H / Hkv, Dh head_dim, Dv width
of values. A bias is added to the scores: (T, S) or (H, T, S).
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

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
    return softmax(scores if bias is None else scores + bias.to(scores.dtype))


def grouped_scores(q: Tensor, k: Tensor) -> Tensor:
    """q k^T / sqrt(Dh), the G queries of a KV head in one product: (B, H, T, S)."""
    B, H, T, Dh = q.shape
    q = (q * (1 / math.sqrt(Dh))).reshape(B, k.size(1), -1, Dh)
    return (q @ k.mT).view(B, H, T, -1)


def masked_softmax(scores: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None) -> Tensor:
    """Attention weights of finished scores (B, H, T, S): softmax(scores + bias) over visible keys."""
    mask = causal_mask(q_pos, k_pos, scores.dtype)
    mask = mask if bias is None else mask + bias.to(scores.dtype)
    return softmax(scores + mask)


def softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension, in the dtype of the scores."""
    # On a CPU, softmax of such short rows is slower in bfloat16 than in float32.
    exact = torch.float32 if scores.size(-1) < 32 and scores.dtype == torch.bfloat16 else None
    return scores.softmax(dim=-1, dtype=exact).to(scores.dtype)


def matmul_attention(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Tensor | None, p: float
) -> Tensor:
    """Attention as two batched products, with dropout p on the weights: (B, H, T, Dv)."""
    return weighted_values(attention_weights(q, k, q_pos, k_pos, bias), v, p)


def weighted_values(weights: Tensor, v: Tensor, p: float) -> Tensor:
    """Weights (B, H, T, S), with dropout p, times values (B, Hkv, S, Dv): (B, H, T, Dv)."""
    B, H, T, S = weights.shape
    Hkv = v.size(1)
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
    kernel: str,
) -> Tensor:
    """torch's fused kernels: (B, H, T, Dv). On CUDA, where there are several, by that one alone."""
    if kernel in ("efficient", "sdpa") and k.size(1) != q.size(1):  # which take no grouped KV heads
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scale, width = 1 / math.sqrt(q.size(-1)), v.size(-1)
    common = max(width, k.size(-1))  # they take values as wide as keys only
    q, k, v = (x if x.size(-1) == common else F.pad(x, (0, common - x.size(-1))) for x in (q, k, v))
    if mask is not None and mask.dim() == 3:
        mask = mask[None]  # with three dimensions torch falls back to its slow kernel
    with pinned(kernel) if q.device.type == "cuda" else nullcontext():
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            mask,
            dropout_p=p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=k.size(1) != q.size(1),
        )
    return y[..., :width]


def pinned(kernel: str) -> AbstractContextManager[object]:
    """Context in which torch takes this kernel or raises RuntimeError, instead of taking another."""
    if kernel == "sdpa":
        return nullcontext()
    return sdpa_kernel(
        {
            "flash": SDPBackend.FLASH_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION,
            "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "math": SDPBackend.MATH,
        }[kernel]
    )
