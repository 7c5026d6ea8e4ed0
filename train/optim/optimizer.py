"""Torch optimizers over the named parameters of a model, as one."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

Groups = list[dict[str, Any]]  # torch's: parameters, and how they are stepped


class Part(Protocol):
    """What an optimizer is here: a torch.optim.Optimizer, or as much of one as we need."""

    param_groups: Groups
    state: Any

    def step(self) -> object: ...


class Optimizer:
    """One or more torch optimizers over the named parameters of a model, as one.

    Its state is keyed by parameter name: `embed.weight/exp_avg`, and so on.
    """

    def __init__(self, model: nn.Module, parts: Sequence[Part]) -> None:
        self.parameters = dict(model.named_parameters())
        self.parts = parts

    def step(self, lr: float) -> None:
        """Update the parameters from their gradients at this learning rate."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
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
