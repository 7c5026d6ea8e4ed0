"""Dropout that does not dominate a small model's step on a CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element with probability p and scale the rest so that the mean stays.

    On a CPU, one random byte decides an element: p is rounded to 256ths, 1/256 at least (0.1
    becomes 26/256), and the scale is exact for the rounded p. Elsewhere, and under torch.compile,
    this is F.dropout. Draws from torch's global generator, which the trainer seeds with (seed, step).
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    dropped = min(max(round(p * 256), 1), 255)
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64)
    words.random_(-(2**63), None)  # the whole range: plain random_() never sets the sign bit
    kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= dropped
    return x * kept.to(x.dtype).mul_(256 / (256 - dropped))
