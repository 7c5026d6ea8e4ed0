"""Learning-rate schedules: pure functions of the step, so resuming needs no state."""

import math


class Schedule:
    """The learning rate of each step: linear warm-up, then constant, cosine, linear or WSD.

    `cosine` and `linear` decay to `final_lr * lr` at the last step; `wsd` (warm-up, stable, decay)
    decays linearly to it over the last `cooldown` of the steps after warm-up.
    Raises ValueError for values out of range.
    """

    def __init__(
        self, *, lr: float, warmup: int, schedule: str, final_lr: float, cooldown: float, steps: int
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr={lr} must be above 0")
        if warmup < 0:
            raise ValueError(f"warmup={warmup} must be at least 0")
        if not 0 <= final_lr <= 1:
            raise ValueError(f"final_lr={final_lr} must be from 0 to 1: it is a fraction of lr")
        if not 0 < cooldown <= 1:
            raise ValueError(
                f"cooldown={cooldown} must be above 0 and at most 1: it is a fraction of the steps"
            )
        shapes = {
            "constant": constant,
            "cosine": cosine,
            "linear": linear,
            "wsd": wsd,
        }
        if schedule not in shapes:
            raise ValueError(f"schedule={schedule} is not one of {', '.join(shapes)}")
        self.lr, self.warmup, self.final_lr, self.steps = lr, warmup, final_lr, steps
        self.shape, self.cooldown = shapes[schedule], cooldown

    def __call__(self, step: int) -> float:
        """The learning rate of step 0, 1, ..., steps - 1."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup + 1) / max(1, self.steps - self.warmup)
        height = self.shape(min(1.0, progress), self.cooldown)
        return self.lr * (self.final_lr + (1 - self.final_lr) * height)


def constant(progress: float, cooldown: float) -> float:
    """Height of the curve, 1 to 0, after this fraction of the steps that follow warm-up."""
    return 1.0


def cosine(progress: float, cooldown: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def linear(progress: float, cooldown: float) -> float:
    return 1 - progress


def wsd(progress: float, cooldown: float) -> float:
    return min(1.0, (1 - progress) / cooldown)
