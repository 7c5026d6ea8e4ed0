"""Attention with a bias or a window, in one call of torch's FlexAttention."""

import math

from torch import Tensor


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None = None
) -> Tensor:
    """Causal attention of q (B, H, T, Dh) over k (B, Hkv, T, Dh) and v (B, Hkv, T, Dv): (B, H, T, Dv).

    `bias` (H, T) is added to the scores of keys 0 to T - 1 tokens back; with a `window`, a query sees
    the last so many keys. In a compiled program it is one kernel that holds no numbers of pairs and
    skips blocks without visible ones; elsewhere torch holds all scores.
    """
    from torch.nn.attention import flex_attention as torchs

    def visible(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = query - key
        return back >= 0 if window is None else (back >= 0) & (back < window)

    def biased(score: Tensor, _: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert bias is not None
        return score + bias[head, (query - key).abs()]

    length, device = q.size(2), str(q.device)
    seen = torchs.create_block_mask(visible, None, None, length, length, device=device)
    y = torchs.flex_attention(
        q.to(v.dtype), k.to(v.dtype), v,
        score_mod=None if bias is None else biased,
        block_mask=seen,
        scale=1 / math.sqrt(q.size(-1)),
        enable_gqa=k.size(1) != q.size(1),
    )  # fmt: skip
    assert isinstance(y, Tensor)
    return y
