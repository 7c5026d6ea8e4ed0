"""A run mirrored to Weights & Biases by a process of its own, which can neither stop it nor change it.

What that process knows is in the run's folder: python -m train.record.wandb_process FOLDER OFFSET
"""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from train.record.terminal import say

PATIENCE = 2.0  # seconds that a run waits for its mirror in all, once that has been loaded
LOADING = 20.0  # seconds that it may take to load
LOOK = 1.0  # seconds between looks at the records
LEAVE = 600.0  # seconds after the run until a mirror that is still uploading gives up
LOADED, READY = "loaded", "ready"  # what a mirror says of itself; anything else is why it failed


@contextlib.contextmanager
def mirrored(folder: Path, mode: str) -> Iterator[None]:
    """Within it, what is added to a run is mirrored, unless the mode is `disabled`."""
    if mode == "disabled":
        yield
        return
    try:
        mirror = Mirror(folder)
    except OSError as error:
        say(f"warning: wandb failed, going on without it: {error}")
        yield
        return
    try:
        yield
    finally:
        mirror.close()


class Mirror:
    """The mirror of a run, seen from the run. Whatever fails there becomes one warning here."""

    def __init__(self, folder: Path) -> None:
        """Start it, and wait a moment until it stands: its start would slow the first steps."""
        offset = (folder / "metrics.jsonl").stat().st_size
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "train.record.wandb_process",
                str(folder.resolve()),
                str(offset),
            ],
            cwd=Path(__file__).resolve().parents[2],
            stdin=subprocess.PIPE,  # closed when the run ends, however it does
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the run
        )
        self.told: list[str] = []
        self.loaded, self.ready = threading.Event(), threading.Event()
        threading.Thread(target=self.listen, daemon=True).start()
        self.loaded.wait(LOADING)
        start = time.monotonic()
        self.ready.wait(PATIENCE)
        self.patience = PATIENCE - (time.monotonic() - start)  # that is left for the end

    def listen(self) -> None:
        """Take in what the mirror says: that it is loaded, that it is ready, why it failed."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.told.append(line.decode().strip())
            self.loaded.set()
            if self.told[-1] != LOADED:
                self.ready.set()
        self.loaded.set()  # or it never will be
        self.ready.set()

    def close(self) -> None:
        """The run has ended: let the mirror end too, and say if it could not."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            code = self.process.wait(max(0.1, self.patience))
        except subprocess.TimeoutExpired:
            say("wandb has not finished; it goes on by itself, and the run is complete without it")
            return
        if code:
            said = [line for line in self.told if line not in (LOADED, READY)]
            why = said[-1] if said else f"exit code {code}"
            say(f"warning: wandb failed, the run is complete without it: {why}")


def mirror(folder: Path, offset: int) -> None:
    """Mirror the records of a run, those after the first `offset` bytes, until standard input ends."""
    import wandb

    tell(LOADED)
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
        settings=wandb.Settings(console="off", silent=True, x_disable_stats=True),
    )
    tell(READY)
    over = threading.Event()
    threading.Thread(target=listen_for_end, args=[over], daemon=True).start()
    with (folder / "metrics.jsonl").open("rb") as file:
        file.seek(offset)
        while True:
            last = over.wait(LOOK)
            for record in new_records(file):
                step, split = record.pop("step"), record.pop("split")
                run.log({f"{split}/{key}": value for key, value in record.items()}, step=step)
            if last:
                break
    threading.Thread(target=leave, daemon=True).start()
    summary = folder / "summary.json"
    if summary.exists():
        run.summary.update(json.loads(summary.read_text(encoding="utf-8")))
    run.finish(exit_code=0 if summary.exists() else 1)


def listen_for_end(over: threading.Event) -> None:
    """Set an event when the run has closed our standard input, or is no more."""
    sys.stdin.read()
    over.set()


def new_records(file: BinaryIO) -> Iterator[dict[str, Any]]:
    """The records that were added to an open metrics.jsonl; a line still being written stays."""
    while line := file.readline():
        if not line.endswith(b"\n"):
            file.seek(-len(line), 1)
            return
        yield json.loads(line)


def tell(line: str) -> None:
    """Say something to the run, if it is still there."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def leave() -> None:
    """End this process, whatever it is still waiting for."""
    time.sleep(LEAVE)
    os._exit(1)


def main(folder: str, offset: str) -> None:
    try:
        mirror(Path(folder), int(offset))
    except Exception as error:  # noqa: BLE001  whatever wandb does, the run hears of it in one line
        tell(f"{type(error).__name__}: {' '.join(str(error).split())}")
        os._exit(1)  # without the minutes that wandb may take to give up


if __name__ == "__main__":
    main(*sys.argv[1:])
