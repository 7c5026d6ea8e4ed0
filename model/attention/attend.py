"""softmax(q k^T / sqrt(Dh) + bias) v under the causal mask: the only place that calls a kernel.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, G = H / Hkv, Dh head_dim, Dv width
of values.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from model.attention.base import Bias
from model.ops.dropout import drop

#: Given weights (B, H, T, S), float32, and the positions (T,) and (S,) of queries and keys.
Watcher = Callable[[Tensor, Tensor, Tensor], object]
_watchers: list[Watcher] = []


def attend(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, bias: Bias, p: float = 0.0
) -> Tensor:
    """Causal attention of q (B, H, T, Dh) over k (B, Hkv, S, Dh) and v (B, Hkv, S, Dv).

    Returns (B, H, T, Dv). Query i sees the keys with k_pos <= q_pos[i]. `bias(q_pos, k_pos)` is added to the scores;
    `p` is dropout on the weights, for training. Keys are never copied out to H heads where the
    kernel can avoid it. Which kernel, `choose_kernel` says.
    """
    added = bias(q_pos, k_pos)
    for watcher in _watchers:
        watcher(weigh(q.float(), k.float(), q_pos, k_pos, added), q_pos, k_pos)
    T, S = q.size(2), k.size(2)
    masked = added is not None or 1 < T != S  # one query may see all that is there
    kernel = choose_kernel(
        q.device.type,
        q.dtype,
        S,
        biased=masked,
        p=p,
        decoding=T == 1,
        trained=torch.is_grad_enabled(),
    )
    if kernel == "matmul":
        return matmul(q, k, v, q_pos, k_pos, added, p)
    mask = None
    if masked:
        mask = causal_mask(q_pos, k_pos, q.dtype)
        mask = mask if added is None else mask + added.to(q.dtype)
        # One dimension less than q, and torch leaves its fused kernels for the slow one.
        mask = mask[None] if mask.dim() == 3 else mask
    shared = kernel == "flash"  # other fused kernels take no grouped heads
    if not shared and k.size(1) != q.size(1):
        group = q.size(1) // k.size(1)
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    width = v.size(-1)
    if width != k.size(-1):
        v = F.pad(v, (0, k.size(-1) - width))  # fused kernels take one width alone
    y = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        dropout_p=p,
        is_causal=T == S and not masked,
        enable_gqa=k.size(1) != q.size(1),
    )
    return y[..., :width]


def choose_kernel(
    device: str,
    dtype: torch.dtype,
    length: int,
    *,
    biased: bool,
    p: float,
    decoding: bool = False,
    trained: bool = True,
) -> str:
    """The fastest correct kernel for keys of this length, whatever the mechanism.

    `matmul` is ours: two products around a softmax. `flash` and `sdpa` are torch's fused kernels,
    `sdpa` with the KV heads copied out, because there they take no grouped heads; `decoding`, one
    query to a text, never does that. `trained` says that a backward pass may follow.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if device == "cpu":  # measured crossing points: flash is slow backward, above all in bfloat16
        if decoding or not trained:
            return "matmul" if decoding and not half else "flash"
        return "matmul" if biased or p > 0 or length <= (1024 if half else 128) else "flash"
    flash = device == "cuda" and half and not biased
    return "flash" if flash else "matmul" if decoding else "sdpa"


def matmul(
    q: Tensor, k: Tensor, v: Tensor, q_pos: Tensor, k_pos: Tensor, added: Tensor | None, p: float
) -> Tensor:
    """Attention as two batched products; the G queries of a KV head share one product with it."""
    B, H, T, _ = q.shape
    Hkv, S = k.shape[1:3]
    weights = weigh(q, k, q_pos, k_pos, added)
    if p > 0:
        weights, scale = drop(weights, p)
        v = v * scale
    v = v.reshape(B * Hkv, S, v.size(-1))
    return torch.bmm(weights.view(B * Hkv, -1, S), v).view(B, H, T, -1)


def weigh(q: Tensor, k: Tensor, q_pos: Tensor, k_pos: Tensor, added: Tensor | None) -> Tensor:
    """The weights that queries give to keys: (B, H, T, S)."""
    B, H, T, Dh = q.shape
    Hkv, S = k.shape[1:3]
    G = H // Hkv
    q = (q * (1 / math.sqrt(Dh))).reshape(B * Hkv, G * T, Dh)
    k = k.reshape(B * Hkv, S, Dh)
    if T == 1:
        scores = torch.bmm(q, k.transpose(1, 2))  # (B * Hkv, G, S)
    else:
        mask = causal_mask(q_pos, k_pos, q.dtype)
        if added is not None and added.dim() == 2:  # one for all heads: no pass of its own
            mask, added = mask + added.to(mask.dtype), None
        scores = torch.baddbmm(mask.repeat(G, 1), q, k.transpose(1, 2))  # (B * Hkv, G * T, S)
    scores = scores.view(B, H, T, S)
    scores = scores if added is None else scores + added.to(scores.dtype)
    # On a CPU, bfloat16 rows this short take longer than float32's.
    exact = torch.float32 if S < 32 and scores.dtype == torch.bfloat16 else None
    return scores.softmax(dim=-1, dtype=exact).to(scores.dtype)


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Within it, `watcher` sees the weights of every attention; they change nothing in the model."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def causal_mask(q_pos: Tensor, k_pos: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may look, -inf where the key lies ahead: (T, S)."""
    ahead = k_pos > q_pos[:, None]
    return torch.zeros(ahead.shape, dtype=dtype, device=ahead.device).masked_fill_(ahead, -math.inf)
