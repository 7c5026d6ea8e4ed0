"""Initialisation by (seed, parameter name), so that variants share the tensors they have in common."""

import hashlib
import math

import torch
from torch import nn

from model.transformer import Transformer


def init_weights(model: Transformer, seed: int, *, scaled: str = "out.weight") -> None:
    """Draw every parameter from a CPU generator seeded by (seed, its name).

    Variants that share a tensor, by name and shape, therefore start from the same values.
    Matrices N(0, 0.02), those of a module with an `init_std` N(0, init_std); where the name ends in
    `scaled`, as that of the last of a residual branch, divided by sqrt(2 n_layers) (GPT-2). Biases 0,
    norms 1.
    """
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.constant_(parameter, 0.0 if name.endswith("bias") else 1.0)
            continue
        std = getattr(model.get_submodule(name.rpartition(".")[0]), "init_std", 0.02)
        if name.endswith(scaled):
            std /= math.sqrt(2 * model.shape.n_layers)
        generator = torch.Generator().manual_seed(derive_seed(seed, name))
        with torch.no_grad():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, std, generator=generator))


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits from all parts, as (seed, name) or (seed, step), the same on every machine.

    torch's CPU generator uses its last 32 bits.
    """
    digest = hashlib.sha256(":".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
