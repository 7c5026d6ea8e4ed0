"""AdamW."""

from collections import defaultdict

import torch
from torch import Tensor, nn

from train.optim.optimizer import Groups, Optimizer, check, decay_groups


class FusedAdamW:
    """torch.optim.AdamW(fused=True), bit for bit: its kernel without the module around it.

    That module imports torch's compiler when it is first used, which takes a second, more than a
    small run's training.
    """

    def __init__(self, groups: Groups, *, beta1: float, beta2: float, eps: float) -> None:
        self.param_groups = groups
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state_of(p) for p in params]
            keys = ("exp_avg", "exp_avg_sq", "step")
            averages, squares, steps = ([state[key] for state in states] for key in keys)
            torch._foreach_add_(steps, 1)
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
            )

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Means of the gradient and its square, and the steps done; zeros before the first."""
        if not self.state[parameter]:
            self.state[parameter] = {
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
                "step": torch.zeros((), device=parameter.device),
            }
        return self.state[parameter]


class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter 2019).

    `decayed` says what weight decay pulls: all `matrices`, embeddings included (GPT-2, nanoGPT), or
    the weights of `linear` layers alone.
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
        check(weight_decay=weight_decay, decayed=decayed, beta1=beta1, beta2=beta2, eps=eps)
        groups = decay_groups(model, model.parameters(), weight_decay, decayed)
        super().__init__(model, [FusedAdamW(groups, beta1=beta1, beta2=beta2, eps=eps)])
