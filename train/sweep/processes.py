"""Runs as processes of their own on this machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from filelock import FileLock, Timeout

from data.atomic import read_json_or, write_json
from train.config.compose import parse
from train.parallel.forks import Fork, Server
from train.parallel.parent import with_parent
from train.record import wandb_process
from train.record.terminal import say
from train.sweep.slots import Slot

ROOT = Path(__file__).resolve().parents[2]
STOPPED = (signal.SIGINT, signal.SIGTERM)  # what ends a run that is to go on later


class Stop(Exception):
    """A signal ended the sweep; its runs have saved, where processes can be told to (not on Windows)."""


class Process(Protocol):
    """What a sweep needs of subprocess.Popen."""

    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def terminate(self) -> None: ...
    def kill(self) -> None: ...


#: What starts `python COMMAND` with more variables, given the file for what it says.
Start = Callable[[Sequence[str], Mapping[str, str], IO[bytes]], Process]


def start_new(command: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> Process:
    """Start a new process."""
    return subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env=with_parent(environment),
        start_new_session=True,  # a Ctrl-C reaches the sweep, which tells its runs
    )


@contextmanager
def starting(number: int, environment: Mapping[str, str]) -> Iterator[Start]:
    """What starts so many processes of runs: as forks, which start sooner, where that is possible.

    The environment is what all of them have when libraries are loaded; each may be given more. Their
    Python code is that of the first one's start, whatever is edited meanwhile.
    """
    if number < 2 or not Server.possible():
        yield start_new
        return
    loads = ["cli.train", *modules("model", "data", "train"), "train.record.run_log:git_commit"]
    with ExitStack() as held:
        wandb = held.enter_context(Server([f"{wandb_process.__name__}:prepare"], {}))
        asks = wandb.requests.fileno()
        environment = {**environment, wandb_process.FORKS: str(asks)}
        server = held.enter_context(Server(loads, environment, keeps=[asks]))
        nothing = held.enter_context(Path(os.devnull).open("rb"))
        lost = False

        def start(command: Sequence[str], more: Mapping[str, str], log: IO[bytes]) -> Process:
            nonlocal lost
            if lost:
                return start_new(command, more, log)
            streams = [nothing.fileno(), log.fileno(), log.fileno()]
            values = [command[0], None, "__main__"]
            try:
                return Fork(
                    server.requests, "runpy:run_path", values,
                    streams=streams, arguments=command, environment=more,
                )  # fmt: skip
            except OSError:
                lost = True  # the server has ended, or does not answer
                return start_new(command, more, log)

        yield start


def modules(*packages: str) -> list[str]:
    """The names of all modules of our packages."""
    files = [path for package in packages for path in sorted((ROOT / package).rglob("[!_]*.py"))]
    return [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]


class Child:
    """A run in a process of its own, its output in a log file beside the run's folder."""

    def __init__(self, overrides: Sequence[str], slot: Slot, start: Start = start_new) -> None:
        self.slot, self.folder = slot, folder_of(overrides)
        self.log = log_of(self.folder)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.before = stamp_of(self.folder)
        self.told = False  # to stop
        command = [str(ROOT / "train.py"), *overrides]
        with self.log.open("ab") as log:
            self.process = start(command, slot.environment(), log)

    def ended(self) -> bool:
        """Whether the process is over. If it could not say itself how, its status now does."""
        if self.process.poll() is None:
            return False
        code = -signal.SIGTERM if self.told else self.process.returncode
        settle(self.folder, code, self.before)
        return True

    def stop(self, *, at_once: bool = False) -> None:
        """Tell the process to save and end; or end it `at_once`."""
        self.told = True
        self.process.kill() if at_once else self.process.terminate()


Ended = Callable[[Path], None]  # what to do after each run, given its folder
Place = Callable[[list[list[str]], Ended], None]  # what runs many, given their overrides


def launch_here(
    runs: list[list[str]], slots: list[Slot], ended: Ended, start: Start = start_new
) -> None:
    """Run all on this machine, in order, as places are free; a run that is still going is waited for.

    Raises Stop after a signal, once its runs were told and have ended.
    """
    waiting, running, empty = list(runs), list[Child](), list(slots)
    said = set[Path]()
    with signals() as caught:
        try:
            while (waiting or running) and not caught:
                free = [run for run in waiting if empty and not in_use(folder_of(run))]
                for run in free[: len(empty)]:
                    waiting.remove(run)
                    running.append(Child(run, empty.pop(0), start))
                if not running and (folder := folder_of(waiting[0])) not in said:
                    said.add(folder)
                    say(f"waiting for {folder}: a process of an earlier sweep still has it")
                time.sleep(0.1)
                for child in [child for child in running if child.ended()]:
                    running.remove(child)
                    empty.append(child.slot)
                    ended(child.folder)
        finally:
            for child in running:
                child.stop()
            for child in running:
                while not child.ended():
                    if len(caught) > 1:  # asked twice
                        child.stop(at_once=True)
                    time.sleep(0.1)
    if caught:
        raise Stop(caught[0])


@contextmanager
def signals() -> Iterator[list[int]]:
    """The SIGINTs and SIGTERMs that came meanwhile, instead of what they would do."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, frame: caught.append(number))
        for number in STOPPED
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def folder_of(overrides: Sequence[str]) -> Path:
    """The folder that a run's overrides name: the last `out`, which is the one that counts."""
    (*_, out) = (o for o in parse(list(overrides)) if o.key_or_group == "out")
    return Path(str(out.value()))


def log_of(folder: Path) -> Path:
    """Where a run of a sweep leaves what it says."""
    return folder.parent / "logs" / f"{folder.name}.log"


def status_of(folder: Path) -> dict[str, Any] | None:
    """A run's status.json; None before there is one."""
    return read_json_or(folder / "status.json", None)


def stamp_of(folder: Path) -> int | None:
    """When a run last wrote its status; None before it did."""
    path = folder / "status.json"
    return path.stat().st_mtime_ns if path.exists() else None


def settle(folder: Path, code: int, before: int | None) -> None:
    """Write down how a process ended, unless it has done so itself since the stamp `before`."""
    now = status_of(folder)
    told = now is not None and stamp_of(folder) != before and now["state"] != "running"
    if told or (code == 0 and now is not None and now["state"] == "done"):
        return
    state = "interrupted" if -code in STOPPED or code - 128 in STOPPED else "failed"
    status = {"state": state, "reason": reason(code, log_of(folder))}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "status.json", status | {"last_step": now and now["last_step"]})
    except OSError as error:  # others are still to be waited for
        say(f"warning: {folder.name} {state}, and its status cannot be written: {error}")


def reason(code: int, log: Path) -> str:
    """Why a process ended, in words, from its exit code and the last it said."""
    if code < 0:
        numbers = {number.value: number.name for number in signal.Signals}
        name = numbers.get(-code, f"signal {-code}")
        return f"killed by {name}" + (" (often: out of memory)" if name == "SIGKILL" else "")
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    errors = [line for line in said if line.startswith("error: ")]
    if code == 2 and errors:
        return errors[-1].removeprefix("error: ")
    return f"exit code {code}" + (f": {said[-1]}" if said else "")


def in_use(folder: Path) -> bool:
    """Whether a process has a run: one of this sweep, or left over from one that was killed."""
    if not (folder / ".lock").exists():
        return False
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False
