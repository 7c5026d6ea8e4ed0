"""An optimizer with one learning rate and a state keyed by parameter name."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from train.parallel.shard import bytes_here, part_of

Groups = list[dict[str, Any]]  # torch's parameter groups


class TorchOptimizer(Protocol):
    """The part of torch.optim.Optimizer that is used here."""

    param_groups: Groups
    state: Any

    def step(self, unless: Tensor | None) -> object: ...


class Optimizer:
    """One or more torch optimizers over the named parameters of a model.

    The state is keyed by parameter name and kind: `embed.weight/exp_avg`.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[TorchOptimizer]) -> None:
        self.parameters = dict(model.named_parameters())
        self.optimizers = optimizers

    def step(self, lr: float, unless: Tensor | None = None) -> None:
        """Update the parameters from their gradients at this learning rate, or their multiple of it.

        Nothing changes if `unless`, a boolean () on the device, is true: so the host need not wait to
        know.
        """
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("rate", 1.0)
            optimizer.step(unless)

    def zero_grad(self) -> None:
        """Free the gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """All tensors of the state, by parameter name and kind."""
        return {
            f"{name}/{kind}": value
            for name, parameter in self.parameters.items()
            for optimizer in self.optimizers
            for kind, value in optimizer.state.get(parameter, {}).items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned. Raises KeyError for an unknown parameter."""
        owner = {p: o for o in self.optimizers for group in o.param_groups for p in group["params"]}
        for key, value in state.items():
            name, kind = key.rsplit("/", 1)
            parameter = self.parameters[name]
            like = parameter if value.shape == parameter.shape else value.to(parameter.device)
            owner[parameter].state[parameter][kind] = part_of(value, like)

    @property
    def nbytes(self) -> int:
        """Bytes of the state that this process holds."""
        return sum(bytes_here(value) for value in self.state().values())


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model that are not frozen."""
    return [p for p in model.parameters() if p.requires_grad]


def decay_groups(
    model: nn.Module, parameters: Iterable[nn.Parameter], weight_decay: float, decayed: str
) -> Groups:
    """The parameters in groups: with weight decay and without, by their multiple of the learning rate."""
    if decayed == "linear":
        with_decay = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    else:
        with_decay = {p for p in model.parameters() if p.dim() >= 2}
    rates, parameters = rates_of(model), list(parameters)
    return [
        {"params": params, "weight_decay": decay, "rate": rate}
        for decay, inside in ((weight_decay, True), (0.0, False))
        for rate in sorted({1.0, *rates.values()})
        if (
            params := [
                p for p in parameters if (p in with_decay, rates.get(p, 1.0)) == (inside, rate)
            ]
        )
    ]


def rates_of(model: nn.Module) -> dict[Tensor, float]:
    """The weights that are trained at a multiple of the learning rate, and the multiple."""
    layers = (m for m in model.modules() if isinstance(m, nn.Linear))
    return {m.weight: rate for m in layers if (rate := getattr(m, "rate", 1.0)) != 1.0}


def check_hyperparameters(
    *, weight_decay: float, decayed: str, beta1: float, beta2: float, eps: float
) -> None:
    """Raise ValueError for values out of range."""
    if weight_decay < 0:
        raise ValueError(f"weight_decay={weight_decay} must be at least 0")
    if decayed not in ("matrices", "linear"):
        raise ValueError(f"decayed={decayed} is not one of matrices, linear")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}={beta} must be at least 0 and below 1")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be above 0")
