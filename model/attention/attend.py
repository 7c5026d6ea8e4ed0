"""Causal attention by the kernel that model/attention/kernel.py chooses.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim, Dv width of values.
"""

import torch
from torch import Tensor

from model.attention.kernel import choose_kernel
from model.ops.attention import Bias, causal_mask, fused_attention, matmul_attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    bias: Bias,
    p: float = 0.0,
    kernel: str = "auto",
) -> Tensor:
    """Causal attention of q (B, H, T, Dh) over k (B, Hkv, S, Dh) and v (B, Hkv, S, Dv).

    Returns (B, H, T, Dv). Query i sees the keys with k_pos <= q_pos[i]. `bias(q_pos, k_pos)` is
    added to the scores; `p` is dropout on the weights, for training. `kernel` is the one asked for.
    KV heads are copied out to H heads only for kernels that take no grouped ones.
    """
    added = bias(q_pos, k_pos)
    T, S = q.size(2), k.size(2)
    has_mask = added is not None or 1 < T != S  # T == S is plainly causal; T == 1 sees all keys
    kernel = choose_kernel(
        q.device.type,
        q.dtype,
        S,
        width=max(q.size(-1), v.size(-1)),
        biased=has_mask,
        p=p,
        decoding=T == 1,
        trained=torch.is_grad_enabled(),
        asked=kernel,
    )
    if kernel == "matmul":
        return matmul_attention(q, k, v, q_pos, k_pos, added, p)
    mask = causal_mask(q_pos, k_pos, q.dtype) if has_mask else None
    if mask is not None and added is not None:
        mask = mask + added.to(q.dtype)
    return fused_attention(q, k, v, mask, p, is_causal=T == S and not has_mask, kernel=kernel)
