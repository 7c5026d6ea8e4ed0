"""Muon for hidden matrices, with AdamW for the rest."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train.measure.device import has_bfloat16_units
from train.optim.adamw import FusedAdamW
from train.optim.optimizer import (
    Groups,
    Optimizer,
    check_hyperparameters,
    decay_groups,
    rates_of,
    trained,
)
from train.parallel.shard import is_sharded, part_of, whole


class StackedMuon:
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), batched over matrices of equal shape.

    A small matrix does not fill a processor; a batched product of all matrices of its shape does.
    Of a sharded model, every process gathers one matrix after the other. Orthogonalises in bfloat16
    where the hardware multiplies it, elsewhere in float32.
    """

    #: Of the quintic Newton-Schulz iteration (Jordan et al. 2024).
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(
        self, params: Iterable[nn.Parameter], *, momentum: float, weight_decay: float
    ) -> None:
        self.param_groups: Groups = [{"params": list(params)}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self, unless: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, unless that is true, which it waits to know."""
        if unless is not None and unless:
            return
        (group,) = self.param_groups
        stacks = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                stacks[p if is_sharded(p) else tuple(sorted(p.shape))].append(p)
        for params in stacks.values():
            grads = [p.grad for p in params]
            averages = [self.average_of(p) for p in params]
            torch._foreach_lerp_(averages, grads, 1 - self.momentum)
            nesterov = [whole(x) for x in torch._foreach_lerp(grads, averages, self.momentum)]
            wide = [x if x.size(0) <= x.size(1) else x.mT for x in nesterov]
            updates = self.orthogonalise(torch.stack(wide))
            torch._foreach_mul_(params, 1 - group["lr"] * self.weight_decay)
            longer = max(params[0].shape)
            rate = group["lr"] * 0.2 * math.sqrt(longer)  # matches the RMS of AdamW's updates
            for p, update in zip(params, updates, strict=True):
                update = update if p.shape == update.shape else update.mT
                p.add_(part_of(update, p), alpha=-rate)

    def average_of(self, parameter: nn.Parameter) -> Tensor:
        """Running mean of the gradient, zero before the first step."""
        if not self.state[parameter]:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return self.state[parameter]["momentum_buffer"]

    def orthogonalise(self, x: Tensor) -> Tensor:
        """x (N, m, n), m <= n, with all singular values near 1, by Newton-Schulz iterations."""
        a, b, c = self.COEFFICIENTS
        x = x.to(torch.bfloat16 if has_bfloat16_units(x.device.type) else torch.float32)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(self.ITERATIONS):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices of blocks; AdamW for embeddings, head and vectors.

    Muon's updates are scaled to the RMS of AdamW's (Liu et al. 2025): both share lr and decay.
    `decayed` says which of the AdamW parameters decay; all matrices of blocks do.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        decayed: str,
        momentum: float,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        check_hyperparameters(
            weight_decay=weight_decay, decayed=decayed, beta1=beta1, beta2=beta2, eps=eps
        )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        if rates_of(model):
            raise ValueError("muon has one learning rate for all; optim=adamw can do tune.ratio")
        matrices = {
            p for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2
        }
        hidden = [p for p in trained(model) if p in matrices]
        others = [p for p in trained(model) if p not in matrices]
        muon = StackedMuon(hidden, momentum=momentum, weight_decay=weight_decay)
        groups = decay_groups(model, others, weight_decay, decayed)
        super().__init__(model, [muon, FusedAdamW(groups, beta1=beta1, beta2=beta2, eps=eps)])
