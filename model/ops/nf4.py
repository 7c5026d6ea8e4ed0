"""Four-bit storage of weights: 16 quantiles of a normal distribution, and a scale for each 64 weights.

QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3. Shapes: N weights.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

BLOCK = 64  # weights that share a scale
SCALES = 256  # scales that share one of their own
TAIL = 0.9677083  # probability below the largest code, as in the authors' code
BITS_PER_WEIGHT = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)  # codes, scales in 8 bits, theirs in 32


def codes() -> Tensor:
    """The 16 values from -1 to 1 that a weight can have, in units of its block's largest: float32.

    Quantiles of the standard normal: 8 at equal steps of probability above 0, 7 below, and 0 itself.
    """
    quantile = torch.special.ndtri
    above = quantile(torch.linspace(TAIL, 0.5, 9, dtype=torch.float64)[:-1])
    below = -quantile(torch.linspace(TAIL, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((above, torch.zeros(1, dtype=torch.float64), below)).sort().values
    return (values / values.abs().max()).float()


def nf4(weight: Tensor) -> Tensor:
    """A weight as it comes back from four bits, float32, whatever its shape."""
    flat = weight.detach().float().flatten()
    blocks = F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)  # (N / 64, 64)
    scales = in_eight_bits(blocks.abs().amax(dim=1))  # (N / 64,)
    table = codes().to(flat.device)
    middles = (table[1:] + table[:-1]) / 2
    chosen = torch.bucketize(blocks / scales.clamp(min=1e-12)[:, None], middles)
    return (table[chosen] * scales[:, None]).flatten()[: len(flat)].view(weight.shape)


def in_eight_bits(scales: Tensor) -> Tensor:
    """Scales (N / 64,) as they come back from eight bits: 255 steps around the mean of each 256."""
    mean = scales.mean()
    groups = F.pad(scales - mean, (0, -len(scales) % SCALES)).view(-1, SCALES)
    largest = groups.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
    steps = (groups / largest * 127).round()
    return (steps / 127 * largest + mean).flatten()[: len(scales)]
