"""Scaling of the loss, so that gradients of float16 do not vanish."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class LossScale:
    """A factor on the loss, and gradients divided by it (Micikevicius et al. 2018, arXiv:1710.03740).

    It halves at a step whose gradients are not finite, which then changes nothing, and doubles after
    so many steps in a row that were finite: torch.amp.GradScaler, without waiting for the device.
    """

    START, GROWTH, BACKOFF, INTERVAL = 2.0**16, 2.0, 0.5, 2000

    def __init__(self, device: str) -> None:
        self.scale = torch.full((), self.START, device=device)
        self.finite_steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Divide all gradients by the scale; 1.0 if one of them is not finite, else 0.0: ()."""
        found = torch.zeros((), device=self.scale.device)
        gradients = [p.grad for p in parameters if p.grad is not None]
        torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, 1 / self.scale)
        return found

    def update(self, found: Tensor) -> None:
        """The scale of the next step, after what `unscale` found in this one."""
        torch._amp_update_scale_(
            self.scale, self.finite_steps, found, self.GROWTH, self.BACKOFF, self.INTERVAL
        )

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale.item(), "finite_steps": int(self.finite_steps.item())}

    def load(self, state: dict[str, float]) -> None:
        """Restore what `state` returned."""
        self.scale.fill_(state["scale"])
        self.finite_steps.fill_(int(state["finite_steps"]))
