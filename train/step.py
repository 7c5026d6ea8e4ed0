"""One optimizer step."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import ClassVar, Self

import torch
from torch import Tensor

from data.objective.base import Batch
from model.init import derive_seed
from model.loss import counted, next_token_loss
from model.transformer import Transformer
from train.measure.device import Device
from train.optim.loss_scale import LossScale
from train.optim.optimizer import Optimizer
from train.parallel.ranks import Ranks
from train.parallel.shard import is_sharded, whole
from train.setup.run_setup import Job


@dataclass(frozen=True)
class StepResult:
    """Mean loss of the batch in nats and gradient norm before clipping, and the learning rate.

    With a scale of the loss, that too, and a norm of None if the step was skipped: its gradients were
    beyond float16.
    """

    loss: float
    grad_norm: float | None
    lr: float
    loss_scale: float | None = None

    def record(self) -> dict[str, float | None]:
        """The values that are known."""
        known = asdict(self)
        if self.loss_scale is None:
            del known["loss_scale"]
        return known


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
    no parameter has changed, if the loss or the gradient norm is not finite. With a `scale`, in
    float16, gradients that are not finite skip the step, which no more than `SKIPS` in a row may.
    """

    SKIPS: ClassVar = 20

    model: Transformer
    optimizer: Optimizer
    schedule: Callable[[int], float]  # learning rate of a step
    batches: Callable[[int], Batch]  # batch of a step, on the CPU; targets of -100 do not count
    device: Device
    accumulate: int
    clip: float  # largest gradient norm
    seed: int  # of dropout
    ranks: Ranks = field(default_factory=Ranks)  # the processes that share the micro-batches
    scale: LossScale | None = None
    skips: int = field(default=0, init=False)  # in a row
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
            ranks=job.ranks,
            scale=LossScale(job.device.name) if job.device.dtype == torch.float16 else None,
        )

    def __call__(self, step: int) -> StepResult:
        inputs, targets = self.batch(step)
        loss, number = torch.zeros((), device=self.device.name), counted(targets)
        inputs_of, targets_of = (t.tensor_split(self.accumulate) for t in (inputs, targets))
        for i in self.ranks.share(self.accumulate):
            x, y = inputs_of[i], targets_of[i]
            self.device.seed(derive_seed(self.seed, step, i))  # dropout depends on nothing else
            part = self.loss(x, y) * (counted(y) / number)  # its share of the mean
            (part if self.scale is None else part * self.scale.scale).backward()
            loss += part.detach()
        parameters, factor = list(self.model.parameters()), loss.new_ones(())
        gradients = [p.grad for p in parameters if p.grad is not None]
        self.ranks.sum([*(g for g in gradients if not is_sharded(g)), loss])
        if self.scale is not None:
            factor = self.scale.scale.clone()
            found = self.scale.unscale(parameters)
            self.scale.update(found)
        at_once = self.device.name != "mps" or None  # torch refuses to promise it there
        norm = whole(torch.nn.utils.clip_grad_norm_(parameters, self.clip, foreach=at_once))
        numbers = torch.stack((loss, norm.to(loss.dtype), factor))
        lr = self.schedule(step)
        self.optimizer.step(lr, unless=~numbers.isfinite().all())
        self.optimizer.zero_grad()
        if self.device.name == "cuda":  # still computing: copy the next batch meanwhile
            self.prefetched = step + 1, self.fetch(step + 1)
        mean_loss, grad_norm, used = numbers.cpu().tolist()  # waits for all of the step
        result = self.result(mean_loss, grad_norm, used, lr)
        if not math.isfinite(result.loss + (result.grad_norm or 0)) or self.skips > self.SKIPS:
            raise NonFinite(step, result, inputs)
        return result

    def result(self, loss: float, norm: float, factor: float, lr: float) -> StepResult:
        """The result of a step, by its numbers."""
        if self.scale is None:
            return StepResult(loss, norm, lr)
        skipped = not math.isfinite(norm)
        self.skips = self.skips + 1 if skipped else 0
        return StepResult(loss, None if skipped else norm, lr, factor)

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
