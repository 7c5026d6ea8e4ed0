"""Optimizers: AdamW, and Muon for the hidden matrices with AdamW for the rest."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from train.device import multiplies_bfloat16

Groups = list[dict[str, Any]]  # torch's: parameters, and how they are stepped


class Part(Protocol):
    """What an optimizer is here: a torch.optim.Optimizer, or as much of one as we need."""

    param_groups: Groups
    state: Any

    def step(self) -> object: ...


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


class StackedMuon:
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), all matrices of one shape at a time.

    A small matrix does not fill a processor; a batched product of all that share a shape does. They
    are made orthogonal in bfloat16 where the hardware multiplies it, elsewhere in float32.
    """

    #: Of the quintic whose iteration sends singular values near 1, and how often (Jordan et al. 2024).
    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ITERATIONS = 5

    def __init__(
        self, params: Iterable[nn.Parameter], *, momentum: float, weight_decay: float
    ) -> None:
        self.param_groups: Groups = [{"params": list(params)}]
        self.state: dict[nn.Parameter, dict[str, Tensor]] = defaultdict(dict)
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        """Update every parameter that has a gradient."""
        (group,) = self.param_groups
        alike = defaultdict(list)
        for p in group["params"]:
            if p.grad is not None:
                alike[tuple(sorted(p.shape))].append(p)
        for (_, longer), params in alike.items():
            grads = [p.grad for p in params]
            averages = [self.average_of(p) for p in params]
            torch._foreach_lerp_(averages, grads, 1 - self.momentum)
            ahead = torch._foreach_lerp(grads, averages, self.momentum)  # Nesterov's
            updates = self.orthogonal(torch.stack([wide(x) for x in ahead]))
            torch._foreach_mul_(params, 1 - group["lr"] * self.weight_decay)
            rate = group["lr"] * 0.2 * math.sqrt(longer)  # as large as AdamW's updates
            for p, update in zip(params, updates, strict=True):
                p.add_(update if p.shape == update.shape else update.mT, alpha=-rate)

    def average_of(self, parameter: nn.Parameter) -> Tensor:
        """Mean of the gradient over past steps, zero before the first."""
        if not self.state[parameter]:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return self.state[parameter]["momentum_buffer"]

    def orthogonal(self, x: Tensor) -> Tensor:
        """x (N, m, n), m <= n, with singular values all about 1: Newton-Schulz iterations."""
        a, b, c = self.COEFFICIENTS
        x = x.to(torch.bfloat16 if multiplies_bfloat16(x.device.type) else torch.float32)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(self.ITERATIONS):
            gram = torch.bmm(x, x.mT)
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x


class Optimizer:
    """One or more torch optimizers over the named parameters of a model, as one.

    Its state is keyed by parameter name: `embed.weight/exp_avg`, and so on.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part]) -> None:
        self.parameters = dict(model.named_parameters())
        self.parts = parts

    def step(self, lr: float) -> None:
        """Update the parameters from their gradients at this learning rate, then drop those."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the state, by parameter name and kind."""
        return {
            f"{name}/{kind}": value
            for name, parameter in self.parameters.items()
            for part in self.parts
            for kind, value in part.state.get(parameter, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned. Raises KeyError for a parameter that does not exist."""
        owner = {p: part for part in self.parts for g in part.param_groups for p in g["params"]}
        for key, value in state.items():
            name, kind = key.rsplit("/", 1)
            parameter = self.parameters[name]
            owner[parameter].state[parameter][kind] = value.to(parameter.device)

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in self.state().values())


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


class Muon(Optimizer):
    """Muon (Jordan et al. 2024) for the matrices inside blocks; AdamW for tables, head and vectors.

    Muon's updates are scaled to the size of AdamW's (Liu et al. 2025), so both share lr and decay.
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
        check(weight_decay=weight_decay, decayed=decayed, beta1=beta1, beta2=beta2, eps=eps)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum} must be at least 0 and below 1")
        hidden = [
            p for n, p in model.named_parameters() if n.startswith("blocks.") and p.dim() == 2
        ]
        inside = set(hidden)
        others = [p for p in model.parameters() if p not in inside]
        muon = StackedMuon(hidden, momentum=momentum, weight_decay=weight_decay)
        groups = decay_groups(model, others, weight_decay, decayed)
        super().__init__(model, [muon, FusedAdamW(groups, beta1=beta1, beta2=beta2, eps=eps)])


def wide(x: Tensor) -> Tensor:
    """A matrix with no more rows than columns: x or its transpose."""
    return x if x.size(0) <= x.size(1) else x.mT


def decay_groups(
    model: nn.Module, parameters: Iterable[nn.Parameter], weight_decay: float, decayed: str
) -> Groups:
    """The parameters in two groups: pulled by weight decay, and not."""
    if decayed == "linear":
        pulled = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    else:
        pulled = {p for p in model.parameters() if p.dim() >= 2}
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p in pulled], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p not in pulled], "weight_decay": 0.0},
    ]


def check(*, weight_decay: float, decayed: str, beta1: float, beta2: float, eps: float) -> None:
    """Raise ValueError for values that make no optimizer."""
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must be at least 0")
    if decayed not in ("matrices", "linear"):
        raise ValueError(f"decayed={decayed} is not one of matrices, linear")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}={beta} must be at least 0 and below 1")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0")
