"""Attention over a window of keys, in one call of CUDA's flash kernel."""

import math

import torch
from torch import Tensor


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Causal attention of q (B, H, T, Dh) over the last `window` of k and v (B, Hkv, T, Dh): (B, H, T, Dh).

    In half precision, with compute capability 8.0 and heads of a multiple of 8 channels. The kernel
    takes texts of any length one after another; these are B of T tokens.
    """
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, Dh = q.shape
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.to(v.dtype).transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B * T, H, Dh)
    y = varlen_attn(
        q, k, v, ends, ends, T, T,
        scale=1 / math.sqrt(Dh), window_size=(window - 1, 0), enable_gqa=k.size(1) != H,
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y.view(B, T, H, Dh).transpose(1, 2)
