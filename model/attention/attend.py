"""Dispatch of causal attention to the fastest kernel; the kernels are in model/ops/attention.py.

Shapes: B batch, T queries, S keys, H query heads, Hkv KV heads, Dh head_dim, Dv width of values.
"""

import torch
from torch import Tensor

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
    added to the scores; `p` is dropout on the weights, for training. `kernel` is auto, matmul,
    flash or sdpa. KV heads are copied out to H heads only for kernels that take no grouped ones.
    """
    added = bias(q_pos, k_pos)
    T, S = q.size(2), k.size(2)
    has_mask = added is not None or 1 < T != S  # T == S is plainly causal; T == 1 sees all keys
    kernel = choose_kernel(
        q.device.type,
        q.dtype,
        S,
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
    return fused_attention(
        q, k, v, mask, p, is_causal=T == S and not has_mask, copy_heads=kernel == "sdpa"
    )


def choose_kernel(
    device: str,
    dtype: torch.dtype,
    length: int,
    *,
    biased: bool,
    p: float,
    decoding: bool = False,
    trained: bool = True,
    asked: str = "auto",
) -> str:
    """The fastest correct kernel for keys of this length, whatever the mechanism.

    `matmul` is our two products around a softmax. `flash` and `sdpa` are torch's fused kernels, the
    latter with KV heads copied out. `decoding` is one query per sequence; `trained` means that a
    backward pass may follow.

        CPU   training     matmul with a bias, a mask or dropout, or up to 128 keys (1024 in half
                           precision); else flash
              no backward  flash, but matmul for decoding in float32
        CUDA  half precision without bias or mask: flash
        else  matmul for decoding, which copies no heads; else sdpa

    Measured on 2 cores (AMX, torch 2.13), bfloat16, forward and backward, H = 6, D = 64: at B = 64
    and T = 16, matmul 1.3 ms and flash 14; at T = 256, 60 and 119; at T = 1024 flash is faster.
    Dropout inside torch's call would force its slow math path.

    `asked` other than auto is taken as it is, for measuring what a kernel costs. Raises ValueError
    where torch's flash kernel cannot do it.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    if asked == "flash":
        check_flash(device, half, biased=biased, p=p)
    if asked != "auto":
        return asked
    if device == "cpu":
        if decoding or not trained:
            return "matmul" if decoding and not half else "flash"
        return "matmul" if biased or p > 0 or length <= (1024 if half else 128) else "flash"
    if device == "cuda" and half and not biased:
        return "flash"
    return "matmul" if decoding else "sdpa"


def check_flash(device: str, half: bool, *, biased: bool, p: float) -> None:
    """Raise ValueError where torch would leave its flash kernel for another."""
    if device == "cpu" and p > 0:
        raise ValueError(f"kernel=flash has no dropout on a CPU, and dropout is {p}; matmul has it")
    if device == "cuda" and (biased or not half):
        what = "takes no bias and no mask" if biased else "needs bfloat16 or float16"
        raise ValueError(f"kernel=flash on CUDA {what}; matmul and sdpa work")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"kernel=flash does not exist on {device}; matmul and sdpa work")
