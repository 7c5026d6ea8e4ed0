"""AdamW."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from train.optim.optimizer import Groups, Optimizer, check_hyperparameters, decay_groups, trained


class FusedAdamW:
    """torch.optim.AdamW(fused=True), bit for bit."""

    # torch's own class imports torch's compiler at its first step: a second, which is more than
    # a small run's training takes. This one calls the same kernel without it.

    def __init__(self, groups: Groups, *, beta1: float, beta2: float, eps: float) -> None:
        self.param_groups = groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    @torch.no_grad()
    def step(self, unless: Tensor | None = None) -> None:
        """Update every parameter that has a gradient, unless that is true."""
        found_inf = None if unless is None else unless.float()  # torch's name for it
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state_for(p) for p in params]
            keys = ("exp_avg", "exp_avg_sq", "step")
            averages, squares, steps = ([state[key] for state in states] for key in keys)
            torch._foreach_add_(steps, 1)
            if found_inf is not None:
                torch._foreach_sub_(steps, [found_inf] * len(steps))
            torch._fused_adamw_(
                params,
                [p.grad for p in params],
                averages,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=self.beta1,
                beta2=self.beta2,
                weight_decay=group["weight_decay"],
                eps=self.eps,
                amsgrad=False,
                maximize=False,
                found_inf=found_inf,
            )

    def state_for(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The state of a parameter: zeros before its first step."""
        if not self.state[parameter]:
            self.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
                "step": torch.zeros((), device=parameter.device),
            }
        return self.state[parameter]


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019).

    Weight decay applies to all `matrices`, embeddings included (GPT-2, nanoGPT), or only to the
    weights of `linear` layers.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        weight_decay: float,
        decayed: str,
        beta1: float,
        beta2: float,
        eps: float,
    ) -> None:
        check_hyperparameters(
            weight_decay=weight_decay, decayed=decayed, beta1=beta1, beta2=beta2, eps=eps
        )
        groups = decay_groups(model, trained(model), weight_decay, decayed)
        super().__init__(model, [FusedAdamW(groups, beta1=beta1, beta2=beta2, eps=eps)])
