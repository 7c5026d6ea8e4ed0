"""Causal attention by the kernel that model/attention/kernel.py chooses.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim, Dv width of values.
"""

import torch
from torch import Tensor

from model.attention.kernel import choose_kernel
from model.ops.attention import Bias, causal_mask, fused_attention, matmul_attention
from model.ops.flex_attention import flex_attention


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
    added to the scores; `p` is dropout on the weights, for training. `kernel` is the one asked for;
    where that is flex, which is not for all calls, another.
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
        asked="auto" if kernel == "flex" else kernel,
    )
    if kernel == "matmul":
        return matmul_attention(q, k, v, q_pos, k_pos, added, p)
    mask = causal_mask(q_pos, k_pos, q.dtype) if has_mask else None
    if mask is not None and added is not None:
        mask = mask + added.to(q.dtype)
    return fused_attention(q, k, v, mask, p, is_causal=T == S and not has_mask, kernel=kernel)


def attend_flex(
    q: Tensor, k: Tensor, v: Tensor, pos: Tensor, bias: Bias, window: int | None = None
) -> Tensor:
    """Causal attention of a whole text by torch's FlexAttention: (B, H, T, Dv).

    The tokens are at pos (T,), one after the other. The bias must depend on the distance of query and
    key alone: that of the last query holds all of them. With a window, as model/ops/flex_attention.py.
    """
    last = bias(pos[-1:], pos)  # (H, 1, T) or (1, T), from the first key to the last
    if last is not None:
        last = last.expand(q.size(1), 1, -1).squeeze(1).flip(-1)  # (H, T), from the nearest
    return flex_attention(q, k, v, last, window)
