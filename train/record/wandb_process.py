"""Logging to Weights & Biases from a separate process, which can neither stop nor change the run.

The process reads the run's folder, of which it is told on its standard input.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

from train.parallel.forks import Fork
from train.record.terminal import say

IMPORT_TIMEOUT = 20.0  # seconds to import wandb
WAIT_TIMEOUT = 2.0  # seconds that a run waits for wandb, at its start and its end together
POLL_INTERVAL = 1.0  # seconds between reads of metrics.jsonl
UPLOAD_TIMEOUT = 600.0  # seconds to finish uploading after the run has ended
SAID = IMPORTED, READY, FINISHED = "imported", "ready", "finished"
FAILED = "failed: "  # and why
QUIET: dict[str, Any] = {"console": "off", "silent": True, "x_disable_stats": True}
FORKS = "HEAD_TO_HEAD_WANDB"  # names the open socket of a server that forks such processes


class Importing(NamedTuple):
    """A process that imports wandb, and waits to be told of a run."""

    process: subprocess.Popen[bytes] | Fork
    stdin: IO[bytes]  # closed when the run ends, however it does
    stdout: IO[bytes]


EARLY = list[Importing]()  # those that were started before there was a folder


def import_early(options: object) -> None:
    """Have a process import wandb while this one imports torch, unless the run will not log there.

    `options` are the config's keys of wandb, not yet checked.
    """
    wanted = isinstance(options, dict) and options.get("mode") != "disabled"
    alone = all(os.environ.get(rank, "0") == "0" for rank in ("RANK", "SLURM_PROCID"))
    if wanted and alone:  # of several processes the leader logs
        with contextlib.suppress(OSError):  # the run itself warns
            EARLY.append(importing())


def importing() -> Importing:
    """Start such a process; where there is a server, as a fork of it."""
    if FORKS in os.environ:
        with contextlib.suppress(OSError):
            return forked(int(os.environ[FORKS]))
    process = subprocess.Popen(
        [sys.executable, "-m", "train.record.wandb_process"],
        cwd=Path(__file__).resolve().parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the run
    )
    assert process.stdin is not None
    assert process.stdout is not None
    return Importing(process, process.stdin, process.stdout)


def forked(server: int) -> Importing:
    """The same, as a fork. Raises OSError if there is no server behind the socket."""
    (reads, stdin), (stdout, writes) = os.pipe(), os.pipe()
    theirs = [reads, writes, os.open(os.devnull, os.O_WRONLY)]
    ours = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
    call = "train.record.wandb_process:main"
    try:
        with socket.socket(fileno=os.dup(server)) as requests:
            return Importing(Fork(requests, call, streams=theirs, patience=IMPORT_TIMEOUT), *ours)
    except OSError:
        for file in ours:
            file.close()
        raise
    finally:
        for stream in theirs:
            os.close(stream)


@contextlib.contextmanager
def logged_to_wandb(folder: Path, mode: str) -> Iterator[None]:
    """Context in which new records of a run are logged to wandb, unless the mode is `disabled`."""
    if mode == "disabled":
        yield
        return
    try:
        process = WandbProcess(folder)
    except OSError as error:
        say(f"warning: wandb failed, continuing without it: {error}")
        yield
        return
    try:
        yield
    finally:
        process.close()


class WandbProcess:
    """The logging process, as seen from the run. Any failure there is one warning here."""

    def __init__(self, folder: Path) -> None:
        """Start it and wait until it is ready, or a moment: starting up would slow the first steps."""
        self.process, self.stdin, self.stdout = EARLY.pop() if EARLY else importing()
        run = {
            "folder": str(folder.resolve()),
            "offset": (folder / "metrics.jsonl").stat().st_size,
        }
        with contextlib.suppress(BrokenPipeError):  # it has ended, and has said why
            self.stdin.write(json.dumps(run).encode() + b"\n")
            self.stdin.flush()
        self.reason: str | None = None  # of a failure
        self.said = {message: threading.Event() for message in SAID}
        self.ended = False
        threading.Thread(target=self.listen, daemon=True).start()
        self.said[IMPORTED].wait(IMPORT_TIMEOUT)
        start = time.monotonic()
        self.said[READY].wait(WAIT_TIMEOUT)
        self.remaining = WAIT_TIMEOUT - (time.monotonic() - start)  # seconds, for the end

    def listen(self) -> None:
        """Receive the messages of the process. After its last, there is nothing to wait for."""
        for line in self.stdout:
            message = line.decode().strip()
            if message.startswith(FAILED):
                self.reason = message.removeprefix(FAILED)
                break
            if message in SAID:
                self.said[message].set()
        self.ended = not self.said[FINISHED].is_set()
        for event in self.said.values():
            event.set()

    def close(self) -> None:
        """End the process with the run, and warn if it failed."""
        with contextlib.suppress(BrokenPipeError):  # of what it did not read
            self.stdin.close()
        over = self.said[FINISHED].wait(max(0.1, self.remaining))
        self.process.poll()  # nobody waits for it
        if not over:
            say(
                "wandb has not finished: it continues in the background; the run itself is complete"
            )
        elif self.ended:
            reason = self.reason or f"exit code {self.process.wait()}"
            say(f"warning: wandb failed, the run is complete without it: {reason}")


def prepare() -> None:
    """Do in a process that will be forked what each fork would have to do, and leave no thread."""
    import wandb

    rehearse()
    wandb.teardown()


def rehearse() -> None:
    """Log a run that is thrown away: the first of a process imports much of wandb."""
    import wandb

    with contextlib.suppress(Exception), tempfile.TemporaryDirectory() as nowhere:
        wandb.init(dir=nowhere, mode="offline", settings=wandb.Settings(**QUIET)).finish()


def log_records() -> None:
    """Log the records of the run named on standard input, after the first `offset` bytes, to wandb,
    until standard input ends."""
    if "wandb" not in sys.modules:  # not a fork of a process that has rehearsed
        rehearse()
    import wandb

    wandb.setup(wandb.Settings(**QUIET))
    send(IMPORTED)
    if not (line := sys.stdin.readline()):
        return  # the run was refused
    told = json.loads(line)
    folder, offset = Path(told["folder"]), told["offset"]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options, choices = config["wandb"], config["choices"]
    run = wandb.init(
        project=options["project"],
        group=options["group"] or config["name"],
        name=folder.name,
        id=hashlib.sha256(str(folder).encode()).hexdigest()[:16],
        tags=[choices["attn"], choices["pos"], choices["model"], *options["tags"]],
        config=config,
        dir=folder,
        mode=options["mode"],
        resume="allow",
        settings=wandb.Settings(**QUIET),
    )
    send(READY)
    ended = threading.Event()
    threading.Thread(target=wait_for_end, args=[ended], daemon=True).start()
    with (folder / "metrics.jsonl").open("rb") as file:
        file.seek(offset)
        while True:
            last = ended.wait(POLL_INTERVAL)
            for record in new_records(file):
                step, split = record.pop("step"), record.pop("split")
                run.log({f"{split}/{key}": value for key, value in record.items()}, step=step)
            if last:
                break
    threading.Thread(target=exit_after_timeout, daemon=True).start()
    summary = folder / "summary.json"
    if summary.exists():
        results = json.loads(summary.read_text(encoding="utf-8"))
        run.summary.update({key: value for key, value in results.items() if value is not None})
    run.finish(exit_code=0 if summary.exists() else 1)
    send(FINISHED)  # the run need not wait for the rest
    wandb.teardown()


def wait_for_end(ended: threading.Event) -> None:
    """Set an event when the run closes our standard input, or dies."""
    sys.stdin.read()
    ended.set()


def new_records(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """New records of an open metrics.jsonl; a line still being written is left for later."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), 1)
            return
        yield json.loads(line)


def send(line: str) -> None:
    """Send a message to the run, if it is still alive."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def exit_after_timeout() -> None:
    """End this process even if an upload hangs."""
    time.sleep(UPLOAD_TIMEOUT)
    os._exit(1)


def main() -> None:
    try:
        log_records()
    except Exception as error:  # noqa: BLE001  any failure of wandb is one message
        send(f"{FAILED}{type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(1)  # at once: wandb may take minutes to give up


if __name__ == "__main__":
    main()
