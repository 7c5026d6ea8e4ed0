"""How the runs of a sweep stand: a live table on a terminal, a line for each that ends elsewhere."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Self

from rich.live import Live
from rich.table import Table

from train.record.run_folder import load_summary
from train.record.terminal import CONSOLE, duration, number, say
from train.sweep.processes import log_of, status_of

MARKS = {
    "done": "green",
    "running": "bold",
    "failed": "red",
    "interrupted": "yellow",
    "waiting": "dim",
}
ACTIVE = ("starting", "running")
OVER = ("done", "failed")


@dataclass(frozen=True)
class Watched:
    """What a board must know of a run."""

    name: str
    folder: Path
    steps: int
    expected: float = 0.0  # seconds of a whole run; 0 if nothing is to do


class Board:
    """The state, loss and time left of each run, read from their folders once a second."""

    def __init__(self, runs: Sequence[Watched]) -> None:
        self.runs = runs
        self.started = perf_counter()
        self.before = self.work_done()  # by earlier starts of the sweep
        self.corrected = False
        self.live = Live(
            get_renderable=self.table, console=CONSOLE, refresh_per_second=1, transient=True
        )

    def __enter__(self) -> Self:
        if CONSOLE.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def ended(self, folder: Path) -> None:
        """Note that a run ended, and say how; after the first that is done, how long all will take."""
        run = next(run for run in self.runs if run.folder == folder)
        found = glance(run)
        if found["state"] == "done":
            summary = load_summary(folder) or {}
            took = summary.get("wall_seconds")
            said = f"perplexity {number(summary.get('val_perplexity'), '.3f')}"
            said += f", {duration(took)}" if took else ""
        else:
            said = str(found["reason"])
        over = sum(glance(run)["state"] in OVER for run in self.runs)
        left = self.left() if over < len(self.runs) else None
        said += "" if left is None else f", about {duration(left)} left"
        say(f"{over}/{len(self.runs)}  {run.name}: {found['state']}, {said}")
        if left and found["state"] == "done" and not self.corrected:
            self.corrected = True
            total = perf_counter() - self.started + left
            say(f"at this pace the sweep takes about {duration(total)} in all")

    def left(self) -> float | None:
        """Seconds to the end of the sweep, at its pace so far; None before there is one.

        The pace is that of all steps since the start, whichever run they were of: how long a run
        was expected to take says how much its steps weigh.
        """
        done = self.work_done() - self.before
        if done <= 0:
            return None
        to_do = sum(
            run.expected * (1 - done_part(run, found))
            for run in self.runs
            if (found := glance(run))["state"] not in OVER
        )
        return (perf_counter() - self.started) / done * to_do

    def work_done(self) -> float:
        """Seconds that the steps done so far were expected to take."""
        return sum(run.expected * done_part(run, glance(run)) for run in self.runs)

    def table(self) -> Table:
        """The runs that fit on the screen: first those that are running, then the latest others."""
        found = [(run, glance(run)) for run in self.runs]
        room = max(4, CONSOLE.height - 6)
        active = next((i for i, (_, f) in enumerate(found) if f["state"] in ACTIVE), 0)
        start = max(0, min(active - room // 2, len(found) - room))
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column in ("run", "state", "step", "loss", "perplexity", "left"):
            table.add_column(column, justify="left" if column in ("run", "state") else "right")
        for run, f in found[start : start + room]:
            table.add_row(
                run.name,
                f["state"] if not f["reason"] else f"{f['state']}: {f['reason']}"[:40],
                f"{f['step'] or 0:,}/{run.steps:,}",
                "" if f["loss"] is None else f"{f['loss']:.3f}",
                "" if f["perplexity"] is None else f"{f['perplexity']:.2f}",
                duration(f["left"]) if f["state"] == "running" and f["left"] else "",
                style=MARKS.get(f["state"], ""),
            )
        over = sum(f["state"] in OVER for _, f in found)
        hidden, left = len(found) - min(room, len(found)), self.left()
        table.caption = (
            f"{over}/{len(found)} over, {duration(perf_counter() - self.started)} so far"
            + (f", about {duration(left)} left" if left else "")
            + (f"; {hidden} not shown" if hidden else "")
        )
        return table


def done_part(run: Watched, found: dict[str, Any]) -> float:
    """The part of a run's steps that are done, given how it stands."""
    return 1.0 if found["state"] == "done" else (found["step"] or 0) / max(1, run.steps)


def glance(run: Watched) -> dict[str, Any]:
    """How a run stands: state, reason, step, last training loss, perplexity, seconds left."""
    started = log_of(run.folder).exists()
    waiting = {"state": "starting" if started else "waiting", "reason": None}
    status = status_of(run.folder) or waiting
    found = {"state": status["state"], "reason": status["reason"]}
    found |= {"step": None, "loss": None, "perplexity": None, "left": None}
    for record in tail(run.folder / "metrics.jsonl"):
        if record["split"] == "train" and "step_ms" in record:
            left = (run.steps - record["step"]) * record["step_ms"] / 1e3
            found |= {"step": record["step"], "loss": record["loss"], "left": left}
        elif "perplexity" in record:
            found["perplexity"] = record["perplexity"]
    return found


def tail(path: Path) -> list[dict[str, Any]]:
    """The last records of a file that is being written."""
    if not path.exists():
        return []
    now = path.stat()
    return records_of_end(path, (now.st_mtime_ns, now.st_size))


@functools.lru_cache(maxsize=256)
def records_of_end(path: Path, _: tuple[int, int], size: int = 1 << 16) -> list[dict[str, Any]]:
    """The last records of a file with this stamp: parsed once, as it is looked at every second."""
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - size)
        file.seek(start)
        lines = file.read().split(b"\n")
    found = []
    for line in lines[1 if start else 0 :]:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found
