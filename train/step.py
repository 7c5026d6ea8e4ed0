"""One optimizer step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from data.objective.base import Batch
from model.init import derive_seed
from model.loss import counted, next_token_loss
from model.transformer import Transformer
from train.measure.device import Device
from train.optim.optimizer import Optimizer
from train.setup.run_setup import Job


@dataclass(frozen=True)
class StepResult:
    """Mean loss of the batch in nats and gradient norm before clipping, and the learning rate."""

    loss: float
    grad_norm: float
    lr: float


class NonFinite(ArithmeticError):
    """The loss or the gradient norm of a step (from 0) is not finite; `inputs` (B, T) are its batch."""

    def __init__(self, step: int, result: StepResult, inputs: Tensor) -> None:
        self.step, self.result, self.inputs = step, result, inputs
        super().__init__(
            f"step {step + 1}: loss {result.loss}, gradient norm {result.grad_norm}, "
            f"learning rate {result.lr:g}"
        )


@dataclass(eq=False)
class TrainStep:
    """Forward, backward, clip, update on the batch of a step, in `accumulate` micro-batches.

    It returns when the device has computed all of it, which it waits for once. Raises NonFinite, and
    no parameter has changed, if the loss or the gradient norm is not finite.
    """

    model: Transformer
    optimizer: Optimizer
    schedule: Callable[[int], float]  # learning rate of a step
    batches: Callable[[int], Batch]  # batch of a step, on the CPU; targets of -100 do not count
    device: Device
    accumulate: int
    clip: float  # largest gradient norm
    seed: int  # of dropout
    prefetched: tuple[int, Batch] | None = field(default=None, init=False)  # a step and its batch

    @classmethod
    def of_job(cls, job: Job) -> Self:
        """The training step of a job."""
        return cls(
            job.model,
            job.optimizer,
            job.schedule,
            job.objective,
            job.device,
            accumulate=job.settings.accumulate,
            clip=job.clip,
            seed=job.settings.seed,
        )

    def __call__(self, step: int) -> StepResult:
        inputs, targets = self.batch(step)
        loss, number = torch.zeros((), device=self.device.name), counted(targets)
        micro_batches = (tensor.tensor_split(self.accumulate) for tensor in (inputs, targets))
        for i, (x, y) in enumerate(zip(*micro_batches, strict=True)):
            self.device.seed(derive_seed(self.seed, step, i))  # dropout depends on nothing else
            part = self.loss(x, y) * (counted(y) / number)  # its share of the mean
            part.backward()
            loss += part.detach()
        parameters = self.model.parameters()
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.clip, foreach=True)
        numbers = torch.stack((loss, norm.to(loss.dtype)))
        lr = self.schedule(step)
        self.optimizer.step(lr, unless=~numbers.isfinite().all())
        self.optimizer.zero_grad()
        if self.device.name == "cuda":  # still computing: copy the next batch meanwhile
            self.prefetched = step + 1, self.fetch(step + 1)
        mean_loss, grad_norm = numbers.cpu().tolist()  # waits for all of the step
        result = StepResult(mean_loss, grad_norm, lr)
        if not math.isfinite(result.loss + result.grad_norm):
            raise NonFinite(step, result, inputs)
        return result

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32."""
        with self.device.autocast():
            return next_token_loss(self.model, inputs, targets)

    def batch(self, step: int) -> Batch:
        """The batch of a step, on the device."""
        (prefetched, batch), self.prefetched = self.prefetched or (None, None), None
        return batch if batch and prefetched == step else self.fetch(step)

    def fetch(self, step: int) -> Batch:
        inputs, targets = self.batches(step)
        return self.device.move(inputs), self.device.move(targets)
