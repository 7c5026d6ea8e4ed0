"""Killed runs: at random moments, and at every write of a save.

Each dies in a process of its own: a fork of one that has everything loaded, or the real command.
What they leave must be intact, and the resumed run must lose nothing.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

from tiny import HANG

from data.atomic import TEMPORARY, verify
from train.config.compose import compose
from train.config.schema import Config
from train.measure.timer import matmul_flops_per_second
from train.record import checkpoint
from train.record.run_log import records
from train.run import run_training
from train.trainer import Trainer

STEPS = 24
RUN = (
    "model.dim=32 model.n_layers=2 model.n_heads=4 model.max_len=16 model.dropout=0.2 "
    "attn=gqa pos=rope data.tokenizer=char data.sampling=epochs "
    f"steps={STEPS} batch_size=4 accumulate=2 eval_every=8 save_every=3 optim.warmup=2 threads=1 "
    "sample.tokens=4 wandb.mode=disabled dtype=float32"
).split()

LETTERS = 800  # of text: an epoch is 11 steps, so that runs stop within one, and at its edges
ROOT = Path(__file__).resolve().parents[2]

Losses = list[tuple[int, str, float]]


@dataclass
class Tally:
    """Trials and faults of a campaign."""

    trials: int = 0
    faults: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    #: Called after every trial.
    seen: ClassVar[Callable[["Tally"], object]] = staticmethod(lambda tally: None)

    def tried(self) -> None:
        """Count a trial."""
        self.trials += 1
        self.seen(self)

    def note(self, what: str, times: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + times


@dataclass(frozen=True)
class Scene:
    """A folder for runs that share one config, one cache and the losses of an undisturbed run."""

    folder: Path
    overrides: list[str]
    losses: Losses
    seconds: float  # that the undisturbed run took

    def config(self, out: Path) -> Config:
        return compose([*self.overrides, f"out={out}", "resume=true"])


@contextlib.contextmanager
def scene() -> Iterator[Scene]:
    """A scene with its undisturbed run, made in this process so that forks start warm."""
    small = patch(
        "train.summary.matmul_flops_per_second", partial(matmul_flops_per_second, size=64)
    )  # faster
    with tempfile.TemporaryDirectory(prefix="faults-") as name, small:
        folder = Path(name)
        text = (ROOT / "README.md").read_text(encoding="utf-8")[:LETTERS]
        (folder / "text.txt").write_text(text, encoding="utf-8")
        overrides = [*RUN, f"data.path={folder}/text.txt", f"data.cache={folder}/cache"]
        for out in (folder / "warm", folder / "whole"):
            start = time.monotonic()
            with silent():
                run_training(compose([*overrides, f"out={out}"]))
        seconds = time.monotonic() - start
        yield Scene(folder, overrides, losses_of(folder / "whole"), seconds)


def losses_of(out: Path) -> Losses:
    """All recorded losses of a run: step, split, loss."""
    return [(r["step"], r["split"], r["loss"]) for r in records(out / "metrics.jsonl")]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Context without output."""
    with (
        Path(os.devnull).open("w") as sink,
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        yield


def forked(scene: Scene, out: Path, before: Callable[[], object] = lambda: None) -> int:
    """Train in a fork of this process, after `before` has run there; its process id."""
    config = scene.config(out)
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        with silent():
            before()
            code = run_training(config)
    finally:
        os._exit(code)


def commanded(scene: Scene, out: Path, *further: str) -> int:
    """Train by the real command; its process id."""
    command = [sys.executable, "train.py", *scene.overrides, f"out={out}", "resume=true", *further]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=ROOT, stdout=quiet, stderr=quiet).pid


def in_two(scene: Scene, out: Path) -> int:
    """Train by the real command in two processes; the process id of their leader."""
    return commanded(scene, out, "gpus=2")


def one_of(leader: int, draw: random.Random) -> int:
    """The leader of a run's processes, or another of them."""
    with contextlib.suppress(OSError):
        children = Path(f"/proc/{leader}/task/{leader}/children").read_text().split()
        named = [c for c in children if "train.py" in Path(f"/proc/{c}/cmdline").read_text()]
        return draw.choice([leader, *map(int, named)])
    return leader


def ended(process: int, within: float, until: Callable[[], bool] = lambda: False) -> int | None:
    """Exit code of a process; None if it still runs after `within` seconds or once `until` is true."""
    deadline = time.monotonic() + within
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if until() or time.monotonic() >= deadline:
            return None
        time.sleep(0.0005)


def random_kills(
    scene: Scene,
    kills: int,
    seed: int,
    start: Callable[[Scene, Path], int] = forked,
    longest: float | None = None,
    victim: Callable[[int, random.Random], int] = lambda process, draw: process,
) -> Tally:
    """SIGKILL runs at random moments, and again after they resume, until `kills` have landed.

    Every other kill waits for the next save, and lands inside it. After each, whatever checkpoint
    can be seen must be whole and every record the undisturbed run's; a run that reaches its end must
    have all of them.
    """
    draw, tally, number = random.Random(seed), Tally(), 0
    longest = longest or 1.2 * scene.seconds
    out = scene.folder / "killed-0"
    while tally.trials < kills:
        process = start(scene, out)
        code = ended(process, draw.uniform(0, longest))
        if code is None and tally.trials % 2:
            code = ended(process, longest, until=lambda saving=out: bool(unfinished(saving)))
            time.sleep(draw.uniform(0, 0.003) if code is None else 0)
        if code is None:
            killed = victim(process, draw)
            os.kill(killed, signal.SIGKILL)
            os.waitpid(process, 0)
            tally.tried()
            tally.note("not the leader", killed != process)
            tally.note("inside a save", bool(unfinished(out)))
            tally.faults += damage(scene, out)
        if code is not None or tally.trials == kills:
            code = ended(start(scene, out), HANG) if code is None else code
            tally.faults += unlike(scene, out, code)
            tally.note("runs")
            shutil.rmtree(out, ignore_errors=True)
            number += 1
            out = scene.folder / f"killed-{number}"
    return tally


def unfinished(out: Path) -> list[Path]:
    """Temporary folders of a save in progress, or of a killed one."""
    return list((out / "checkpoints").glob(f"{TEMPORARY}*"))


def damage(scene: Scene, out: Path) -> list[str]:
    """Faults in the folder of a killed run."""
    faults = []
    for folder in sorted((out / "checkpoints").glob("step_*")):
        try:
            verify(folder)
        except ValueError as error:
            faults.append(str(error))
    seen = losses_of(out)
    if seen != scene.losses[: len(seen)]:
        faults.append(f"{out.name}: records differ from the undisturbed run's")
    return faults


def unlike(scene: Scene, out: Path, code: int | None) -> list[str]:
    """Differences of a finished run from the undisturbed one."""
    if code != 0:
        return [f"{out.name}: ended with code {code}"]
    return [] if losses_of(out) == scene.losses else [f"{out.name}: losses differ"]


class Writes:
    """Counts every call that changes the disk, and ends the process at the `crash_at`-th.

    Files that safetensors writes count twice: whole, and cut in half.
    """

    def __init__(self, crash_at: int | None = None) -> None:
        self.crash_at = crash_at
        self.trace: list[tuple[str, str]] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Context in which calls are counted."""
        with contextlib.ExitStack() as stack:
            for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
                stack.enter_context(patch.object(os, name, self.wrap(name, getattr(os, name))))
            text = self.wrap("write", Path.write_text)
            stack.enter_context(patch.object(Path, "write_text", text))
            stack.enter_context(patch.object(checkpoint, "save_file", self.save_file))
            yield

    def count(self, name: str, target: object) -> None:
        self.trace.append((name, path_of(target)))
        if len(self.trace) == self.crash_at:
            os._exit(9)

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(target: Any, *arguments: Any, **options: Any) -> Any:
            self.count(name, target)
            return call(target, *arguments, **options)

        return counted

    def save_file(self, tensors: dict[str, Any], path: Path) -> None:
        self.count("write", path)
        SAVE_FILE(tensors, path)
        if len(self.trace) + 1 == self.crash_at:
            os.truncate(path, path.stat().st_size // 2)
        self.count("half", path)


SAVE_FILE = checkpoint.save_file


def path_of(target: object) -> str:
    """The path of a call's target, which may be an open file."""
    if isinstance(target, int):
        return str(Path(f"/proc/self/fd/{target}").readlink())
    return os.fspath(target)  # type: ignore[call-overload, no-any-return]


@contextlib.contextmanager
def third_save(writes: Writes) -> Iterator[None]:
    """Context that watches the third save of a run, which also deletes a checkpoint."""
    real, saves = Trainer.save, itertools.count()

    def save(trainer: Trainer) -> None:
        with writes.watched() if next(saves) == 2 else contextlib.nullcontext():
            real(trainer)

    with patch.object(Trainer, "save", save):
        yield


def writes_of_a_save(scene: Scene) -> list[tuple[str, str]]:
    """All calls of a run's third save that change the disk, in order, with their paths."""
    writes, out = Writes(), scene.folder / "traced"
    with third_save(writes), silent():
        run_training(scene.config(out))
    shutil.rmtree(out)
    return writes.trace


def crashes(scene: Scene, every: int = 1) -> Tally:
    """End the process at each write of a run's third save (or at every `every`-th).

    Whatever checkpoint can be seen then must be whole, and the run must go on to the same end.
    """
    tally = Tally(notes={"writes in a save": len(writes_of_a_save(scene))})
    for k in range(1, tally.notes["writes in a save"] + 1, every):
        out = scene.folder / f"crashed-{k}"

        def crash(k: int = k) -> None:
            crashing.enter_context(third_save(Writes(k)))

        with contextlib.ExitStack() as crashing:
            code = ended(forked(scene, out, crash), HANG)
        tally.tried()
        if code != 9:
            tally.faults.append(f"{out.name}: ended with code {code}, not at its write")
        if checkpoint.find(out)[0] is None:
            tally.faults.append(f"{out.name}: no checkpoint left")
        tally.faults += damage(scene, out)
        tally.faults += unlike(scene, out, ended(forked(scene, out), HANG))
        shutil.rmtree(out, ignore_errors=True)
    return tally
