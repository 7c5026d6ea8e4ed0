"""The training loop."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from types import FrameType
from typing import NoReturn

import torch
from torch import Tensor

from model.likelihood import bits_per_byte, perplexity, score
from model.loss import next_token_loss
from model.transformer import seed_of
from train.measure.memory import Peaks
from train.measure.timer import Clock
from train.record import checkpoint
from train.record.run_log import Record
from train.record.terminal import Bar, say
from train.setup.run_setup import Job
from train.setup.weights import load

WARMUP_STEPS = 5  # of each start, timed apart; at most a quarter of its steps
LAST = 50  # steps whose mean is the training loss


class Stopped(Exception):
    """Training ended before its last step, in this state and with this exit code."""

    def __init__(self, state: str, reason: str, code: int) -> None:
        super().__init__(reason)
        self.state, self.code = state, code


class Trainer:
    """Trains a job, keeping record. All that it must remember is in `state`."""

    def __init__(self, job: Job, record: Record) -> None:
        self.job, self.record = job, record
        self.model, self.optimizer = job.model, job.optimizer
        self.step = 0  # optimizer steps done
        self.losses: list[float] = []  # of the last steps
        self.validation: dict[str, float] = {}  # the last one
        self.start_loss: float | None = None  # validation before the first step, of given weights
        self.clock = Clock()
        self.peaks = Peaks()
        self.started = perf_counter()
        self.caught: signal.Signals | None = None
        self.ahead: tuple[int, tuple[Tensor, Tensor]] | None = None  # a batch, and its step

    def fit(self) -> None:
        """Train to the last step, validating and saving on the way.

        Raises Stopped on a signal (after saving) and on a loss that is not finite (before it does
        harm).
        """
        settings, first = self.job.settings, self.step
        warmup = min(WARMUP_STEPS, (settings.steps - first) // 4)
        with self.signals(), Bar(settings.steps, self.step) as bar:
            while True:
                last = self.step == settings.steps
                if self.step == 0 and self.job.parent:
                    bar.doing("validating")
                    self.validate()
                    self.start_loss = self.validation.get("loss")
                if due(self.step, settings.eval_every, last):
                    bar.doing("validating")
                    self.validate()
                if due(self.step, settings.save_every, last) and self.step > first:
                    bar.doing("saving")
                    self.save()
                if last:
                    return
                bar.doing("training")
                self.train_step(warm=self.step - first >= warmup)
                if self.step - first == max(1, warmup):
                    self.peaks.reset(self.job.device)
                bar.step(self.step, self.losses[-1], self.tokens_per_second)
                self.heed_signal()

    def train_step(self, warm: bool) -> None:
        """One optimizer step, timed and recorded."""
        start = perf_counter()
        loss, norm, lr = self.update(self.step)
        self.job.device.synchronize()
        seconds = perf_counter() - start
        self.clock.add(seconds, warm)
        self.step += 1
        self.losses = [*self.losses, loss][-LAST:]
        if self.step % self.job.settings.log_every == 0 or self.step == self.job.settings.steps:
            self.log("train", loss=loss, lr=lr, grad_norm=norm, step_ms=1e3 * seconds)

    def update(self, step: int) -> tuple[float, float, float]:
        """Train on the batch of a step: its mean loss, gradient norm and learning rate.

        Raises Stopped, before any parameter changes, if the loss or the norm is not finite.
        """
        settings, device = self.job.settings, self.job.device
        inputs, targets = self.batch(step)
        loss = torch.zeros((), device=device.name)
        parts = (tensor.tensor_split(settings.accumulate) for tensor in (inputs, targets))
        for part, (x, y) in enumerate(zip(*parts, strict=True)):
            device.seed(seed_of(settings.seed, step, part))  # all that dropout depends on
            part_loss = self.loss(x, y) * (len(x) / len(inputs))  # parts may differ by a row
            part_loss.backward()
            loss += part_loss.detach()
        if device.name == "cuda":  # which is still computing
            self.ahead = step + 1, self.fetch(step + 1)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.job.clip, foreach=True)
        lr = self.job.schedule(step)
        if not torch.isfinite(loss + norm):
            self.diverged(inputs, step=step + 1, loss=loss.item(), grad_norm=norm.item(), lr=lr)
        self.optimizer.step(lr)
        return loss.item(), norm.item(), lr

    def diverged(self, inputs: Tensor, **numbers: float) -> NoReturn:
        """Raise Stopped, and leave what there is to see as diverged.json."""
        # JSON has no nan:
        plain = {k: v if math.isfinite(v) else str(v) for k, v in numbers.items()}
        seen = {"losses_before": self.losses, "batch": inputs.tolist()}
        self.record.write("diverged.json", {**plain, **seen})
        at = "step {step}: loss {loss}, gradient norm {grad_norm}, learning rate {lr:g}"
        dump = self.record.folder / "diverged.json"
        told = f"training diverged at {at.format(**numbers)}; {dump} has its batch; "
        raise Stopped("failed", told + "try a lower optim.lr", 3)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of a step, on the device."""
        (at, batch), self.ahead = self.ahead or (step, self.fetch(step)), None
        return batch if at == step else self.fetch(step)

    def fetch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.job.batches(step)
        return self.job.device.take(inputs), self.job.device.take(targets)

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats, float32: inputs and targets (B, T)."""
        with self.job.device.autocast():
            return next_token_loss(self.model, inputs, targets)

    def validate(self) -> None:
        """Score the whole validation split, if there is one, unless this step has been."""
        if self.step:
            self.peaks.note_training(self.job.device)
        corpus = self.job.corpus
        if corpus.val is None or self.validation.get("step") == self.step:
            return
        start = perf_counter()
        text, text_bytes = corpus.split("val")
        nats, tokens = self.score(text, between=self.heed_signal)
        if self.step:
            self.peaks.note_validation(self.job.device)
        loss = nats / tokens
        self.validation = {
            "step": self.step,
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": bits_per_byte(nats, text_bytes),
            "val_tokens": tokens,
        }
        self.log("val", **self.validation, eval_seconds=perf_counter() - start)
        trained = f"train loss {self.train_loss:.4f}  " if self.losses else ""
        say(
            f"step {self.step}/{self.job.settings.steps}  {trained}"
            f"val loss {loss:.4f}  perplexity {self.validation['perplexity']:.3f}"
        )

    def score(
        self, text: Tensor, between: Callable[[], object] = lambda: None
    ) -> tuple[float, int]:
        """Nats and tokens of a text (N,) under the model as it stands."""
        self.model.eval()
        try:
            with self.job.device.autocast():
                return score(
                    self.model,
                    text,
                    context=self.model.shape.max_len,
                    batch_size=self.job.settings.eval_batch_size,
                    device=self.job.device.name,
                    between=between,
                )
        finally:
            self.model.train()

    @property
    def wall_seconds(self) -> float:
        """Time since the run began, all included; a pause before resuming is not."""
        return self.clock.wall_seconds + perf_counter() - self.started

    @property
    def train_loss(self) -> float:
        """Mean loss of the last steps."""
        return sum(self.losses) / len(self.losses)

    @property
    def tokens_per_step(self) -> int:
        return self.job.settings.batch_size * self.model.shape.max_len

    @property
    def tokens_per_second(self) -> float:
        """In training steps after warm-up; 0 before there are any."""
        steps, seconds = len(self.clock.step_seconds), self.clock.train_seconds
        return steps * self.tokens_per_step / seconds if seconds else 0.0

    def log(self, split: str, **values: float) -> None:
        """Write one record."""
        entry = {
            "step": self.step,
            "split": split,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.clock.seconds,
        }
        self.record.log(entry | values)

    def save(self) -> None:
        """Write a checkpoint. Raises Stopped, the earlier ones intact, if the disk refuses."""
        self.record.sync()
        self.clock.wall_seconds, self.started = self.wall_seconds, perf_counter()
        try:
            checkpoint.save(
                self.record.folder,
                self.step,
                dict(self.model.named_parameters()),
                self.optimizer.state(),
                self.state(),
            )
        except OSError as error:
            raise Stopped("failed", str(error), 3) from error
        checkpoint.prune(self.record.folder, self.job.settings.keep)
        self.record.status("running", self.step)

    def state(self) -> dict[str, object]:
        """All that a checkpoint keeps beside tensors."""
        validated = self.validation.get("step") == self.step
        return {
            "losses": self.losses,
            "validation": self.validation,
            "start_loss": self.start_loss,
            "val_loss": self.validation["loss"] if validated else None,
            "clock": asdict(self.clock),
            "peaks": asdict(self.peaks),
            "parent": self.job.parent,
            **self.job.corpus.identity,
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint. Raises ValueError if it is of other data, or of something else."""
        state = saved.state
        try:
            self.job.corpus.check_identity(state, "resume")
            load(self.model, saved.model(), str(saved.folder))
            self.optimizer.load(saved.optimizer())
            self.step = saved.step
            self.losses, self.validation = state["losses"], state["validation"]
            self.start_loss = state.get("start_loss")
            self.clock, self.peaks = Clock(**state["clock"]), Peaks(**state["peaks"])
            self.job.parent = state["parent"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{saved.folder} is no checkpoint of ours: {error!r}") from error

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM wait for the end of a step; a second SIGINT does not wait."""

        def catch(number: int, frame: FrameType | None) -> None:
            self.caught = signal.Signals(number)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        before = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def heed_signal(self) -> None:
        """If a signal came, save and raise Stopped."""
        if self.caught is not None:
            self.save()
            raise Stopped("interrupted", f"{self.caught.name}; saved", 128 + self.caught)


def due(step: int, every: int | None, last: bool) -> bool:
    """Whether something happens after this step: at its multiples, and after the last."""
    return last or (every is not None and step > 0 and step % every == 0)
