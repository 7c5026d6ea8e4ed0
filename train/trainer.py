"""The training loop."""

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from time import perf_counter
from types import FrameType
from typing import Any, NoReturn

import torch

from model.loss import bits_per_byte, nll_of_rows, perplexity, token_nll
from train.measure.memory import PeakMemory
from train.measure.timer import StepTimer
from train.parallel.ranks import Ranks
from train.parallel.shard import free, gathered
from train.record import checkpoint
from train.record.run_log import Record
from train.record.terminal import Bar, duration, say
from train.setup.run_setup import Job
from train.setup.weights import load
from train.step import NonFinite, TrainStep
from train.step_estimate import steps_of_validation

WARMUP_STEPS = 5  # of each process, timed apart; at most a quarter of its steps
TIMED_STEPS = 3  # after warm-up, before a run says how long it takes
SAVE_STEPS, SAVE_SECONDS = 200, 300.0  # between checkpoints with save_every=auto, CPU and GPU
AVERAGED_STEPS = 50  # last steps, whose mean is the training loss


class TrainingStopped(Exception):
    """Training ended before its last step: the run's state and exit code."""

    def __init__(self, state: str, reason: str, code: int) -> None:
        super().__init__(reason)
        self.state, self.code = state, code


class Trainer:
    """Trains a job and records it. `state` is all that a resumed run needs besides tensors."""

    def __init__(self, job: Job, record: Record) -> None:
        self.job, self.record = job, record
        self.model, self.optimizer = job.model, job.optimizer
        self.update = TrainStep.of_job(job)
        self.step = 0  # optimizer steps done
        self.losses: list[float] = []  # of the last steps
        self.validation: dict[str, Any] = {}  # the last one
        self.start_loss: float | None = None  # validation before the first step, with init_from
        self.validating = False
        self.timer = StepTimer()
        graphs = job.device.uses_graphs(job.model, job.settings.accumulate)
        self.peaks = PeakMemory(graphs=graphs)
        self.started = perf_counter()  # or when it last saved
        self.first = 0  # step of this process
        self.late = False  # the next checkpoint, with save_every=auto on a GPU
        self.received_signal: signal.Signals | None = None

    def fit(self) -> None:
        """Train to the last step, with validation and checkpoints.

        Raises TrainingStopped on a signal (after saving) and on a loss that is not finite (before
        the update).
        """
        settings, first = self.job.settings, self.step
        self.first = first
        warmup = min(WARMUP_STEPS, (settings.steps - first) // 4)
        with self.signals(), Bar(settings.steps, self.step) as bar:

            def on_batch() -> None:
                bar.alive()
                if self.job.ranks.size == 1:  # others could not know
                    self.check_signal()

            while True:
                last, scored = self.step == settings.steps, self.validation.get("step")
                if self.step == 0 and self.job.parent:
                    bar.doing("validating")
                    self.validate(on_batch)
                    self.start_loss = self.validation.get("loss")
                if due(self.step, settings.eval_every, last):
                    bar.doing("validating")
                    self.validate(on_batch)
                new = self.validation.get("step") != scored
                resumed = self.step == first > 0  # from a checkpoint that lacks a new validation
                if (new and resumed) or (self.due_to_save(last) and (new or self.step > first)):
                    bar.doing("saving")
                    self.save()
                if last:
                    return
                bar.doing("training")
                self.train_step(warm=self.step - first >= warmup)
                if self.step - first == max(1, warmup):
                    self.peaks.reset(self.job.device)
                left = self.seconds_left
                if left is not None and self.step - first == warmup + TIMED_STEPS:
                    say(f"about {duration(left)} for the other {settings.steps - self.step} steps")
                bar.step(self.step, self.losses[-1], self.tokens_per_second, left)
                self.agree()

    def agree(self) -> None:
        """Stop or save as any of the processes must: they ask each other once a step, here.

        Raises TrainingStopped, after saving, if one of them has received a signal.
        """
        late = perf_counter() - self.started >= SAVE_SECONDS
        number, any_late = self.job.ranks.most([self.received_signal or 0, late])
        self.late = bool(any_late)
        if number:
            self.received_signal = signal.Signals(number)  # of any process, for all
            self.check_signal()  # one that came meanwhile waits: others do not know of it

    def train_step(self, warm: bool) -> None:
        """One optimizer step, timed and recorded."""
        start = perf_counter()
        try:
            result = self.update(self.step)
        except NonFinite as error:
            self.diverged(error)
        seconds = perf_counter() - start
        self.timer.add(seconds, warm)
        self.step += 1
        self.losses = [*self.losses, result.loss][-AVERAGED_STEPS:]
        if self.step % self.job.settings.log_every == 0 or self.step == self.job.settings.steps:
            self.log("train", **result.record(), step_ms=1e3 * seconds)

    def diverged(self, error: NonFinite) -> NoReturn:
        """Write diverged.json and raise TrainingStopped."""
        numbers = {"step": error.step + 1, **error.result.record()}
        # JSON has no nan:
        plain: dict[str, Any] = {
            k: str(v) if v is not None and not math.isfinite(v) else v for k, v in numbers.items()
        }
        batch = {"losses_before": self.losses, "batch": error.inputs.cpu().tolist()}
        self.record.write("diverged.json", plain | batch)
        dump = self.record.folder / "diverged.json"
        raise TrainingStopped(
            "failed",
            f"training diverged at {error}; {dump} has its batch; try a lower optim.lr",
            3,
        ) from error

    def validate(self, on_batch: Callable[[], object]) -> None:
        """Score the whole validation split, if there is one, once a step."""
        trained = self.step > self.first  # a process that has only loaded weights has no such peaks
        if trained:
            self.peaks.note_training(self.job.device, self.job.ranks)
        if self.job.corpus.val is None or self.validation.get("step") == self.step:
            return
        start, self.validating = perf_counter(), True
        nats, tokens = self.score(on_batch)
        self.validating = False
        if trained:
            self.peaks.note_validation(self.job.device, self.job.ranks)
        loss, text_bytes = nats / tokens, self.job.objective.validation_bytes
        self.validation = {
            "step": self.step,
            "loss": loss,
            "perplexity": perplexity(loss),
            "bits_per_byte": text_bytes and bits_per_byte(nats, text_bytes),
            "val_tokens": tokens,
        }
        self.log("val", **self.validation, eval_seconds=perf_counter() - start)
        told = f"train loss {self.train_loss:.4f}  " if self.losses else ""
        say(
            f"step {self.step}/{self.job.settings.steps}  {told}"
            f"val loss {loss:.4f}  perplexity {self.validation['perplexity']:.3f}"
        )

    def score(
        self, on_batch: Callable[[], object] = lambda: None, *, first_batch: bool = False
    ) -> tuple[float, int]:
        """Negative log-likelihood in nats of the validation split, or of its first batch, under the
        current weights, and the number of tokens scored."""
        rows, length = self.job.settings.eval_batch_size, self.model.shape.max_len
        ranks = self.job.ranks if self.job.ranks.summing else Ranks()
        options: dict[str, Any] = {
            "batch_size": rows,
            "device": self.job.device.name,
            "on_batch": on_batch,
        }
        batch = self.job.objective.validation_rows
        self.model.eval()
        try:
            with self.job.device.autocast():
                if batch is not None:
                    end = rows if first_batch else None
                    return nll_of_rows(self.model, *(part[:end] for part in batch), **options)
                text = self.job.corpus.split("val")[0]
                text = text[: rows * length + 1] if first_batch else text
                nats = token_nll(
                    self.model, text, context=length, stride=length,
                    predicted=self.model.shape.latents, share=(ranks.rank, ranks.size), **options,
                )  # fmt: skip
                ranks.sum([nats])
                return nats.sum(dtype=torch.float64).item(), len(nats)
        finally:
            free(self.model)
            self.model.train()

    @property
    def wall_seconds(self) -> float:
        """Seconds since the run began, without pauses before resuming."""
        return self.timer.wall_seconds + perf_counter() - self.started

    @property
    def train_loss(self) -> float:
        """Mean loss of the last steps."""
        return sum(self.losses) / len(self.losses)

    @property
    def tokens_per_step(self) -> int:
        return self.job.settings.batch_size * self.model.shape.max_len

    @property
    def tokens_per_second(self) -> float:
        """Throughput of training steps after warm-up; 0 before the first."""
        steps, seconds = len(self.timer.step_seconds), self.timer.train_seconds
        return steps * self.tokens_per_step / seconds if seconds else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds that the other steps and their validations may take; None during warm-up."""
        timed = len(self.timer.step_seconds)
        if not timed:
            return None
        val_tokens = self.job.objective.validation_tokens
        validations = steps_of_validation(self.job.spec.config, val_tokens, self.step)
        steps = self.job.settings.steps - self.step + validations
        return steps * self.timer.train_seconds / timed

    def log(self, split: str, **values: float | None) -> None:
        """Write one record."""
        entry = {
            "step": self.step,
            "split": split,
            "tokens": self.step * self.tokens_per_step,
            "seconds": self.timer.seconds,
        }
        self.record.log(entry | values)

    def due_to_save(self, last: bool) -> bool:
        """Whether it is time for a checkpoint; steps of a GPU are too fast to count them for that."""
        every = self.job.settings.save_every
        if every == "auto" and self.job.device.name != "cpu":
            return last or self.late  # to any process: a sharded model takes all to save
        return due(self.step, SAVE_STEPS if isinstance(every, str) else every, last)

    def save(self) -> None:
        """Write a checkpoint. Raises TrainingStopped, with earlier ones intact, if the disk is full."""
        leader = self.job.ranks.leader
        model = gathered(dict(self.model.named_parameters()), keep=leader)
        optimizer = gathered(self.optimizer.state(), keep=leader)
        self.timer.wall_seconds, self.started = self.wall_seconds, perf_counter()
        if not leader:
            return
        self.record.sync()
        try:
            checkpoint.save(self.record.folder, self.step, model, optimizer, self.state())
        except OSError as error:
            raise TrainingStopped("failed", str(error), 3) from error
        checkpoint.prune(self.record.folder, self.job.settings.keep)
        self.record.status("running", self.step)

    def state(self) -> dict[str, object]:
        """Everything in a checkpoint besides tensors."""
        validated = self.validation.get("step") == self.step
        return {
            "losses": self.losses,
            "validation": self.validation,
            "start_loss": self.start_loss,
            "val_loss": self.validation["loss"] if validated else None,
            "clock": asdict(self.timer),
            "peaks": asdict(self.peaks),
            "parent": self.job.parent,
            **({"loss_scale": self.update.scale.state()} if self.update.scale else {}),
            **self.job.corpus.identity,
        }

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Continue from a checkpoint. Raises ValueError if it is of other data or malformed."""
        state = saved.state
        try:
            self.job.corpus.check_identity(state, "resume")
            load(self.model, saved.model(), str(saved.folder))
            self.optimizer.load(saved.optimizer())
            self.step = saved.step
            self.losses, self.validation = state["losses"], state["validation"]
            self.start_loss = state.get("start_loss")
            self.timer, self.peaks = StepTimer(**state["clock"]), PeakMemory(**state["peaks"])
            self.job.parent = state["parent"]
            if self.update.scale:
                self.update.scale.load(state["loss_scale"])
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{saved.folder} is not a checkpoint of this program: {error!r}"
            ) from error

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Context that defers SIGINT and SIGTERM to `check_signal`; a second SIGINT is immediate."""

        def catch(number: int, frame: FrameType | None) -> None:
            self.received_signal = signal.Signals(number)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        before = {s: signal.signal(s, catch) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def check_signal(self, *, save: bool = True) -> None:
        """Raise TrainingStopped if a signal was received; saves first unless told not to."""
        if self.received_signal is not None:
            if save:
                self.save()
            raise TrainingStopped(
                "interrupted", f"{self.received_signal.name}; saved", 128 + self.received_signal
            )


def due(step: int, every: int | None, last: bool) -> bool:
    """True at multiples of `every` and after the last step."""
    return last or (every is not None and step > 0 and step % every == 0)
