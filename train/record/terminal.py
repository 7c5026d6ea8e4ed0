"""What a person sees of a run: a live bar on a terminal, few lines in a log file, a table at the end."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    track,
)

T = TypeVar("T")
CONSOLE = Console(stderr=True, highlight=False)
SILENCE = 20.0  # seconds between the lines of a log file, to which the last step may add its own


def say(line: str) -> None:
    """Print a line to stderr, above the progress bar if there is one."""
    CONSOLE.print(printable(line), markup=False, soft_wrap=True)


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    """The items, with a bar on a terminal; redrawn once a second, so as not to disturb timings."""
    return track(
        items,
        what,
        total=total,
        console=CONSOLE,
        disable=not CONSOLE.is_terminal,
        refresh_per_second=1,
    )


class Bar:
    """Steps done, loss, tokens per second and time left: a live bar on a terminal, lines elsewhere.

    A log file gets a line after every `SILENCE` seconds, at the next step or batch.
    """

    def __init__(
        self, total: int, done: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=CONSOLE,
            disable=not CONSOLE.is_terminal,
            transient=True,
        )
        self.task = self.progress.add_task(
            "train", total=total, completed=done, loss=0.0, speed=0.0
        )
        self.total, self.clock, self.written = total, clock, clock()
        self.what, self.state = "", f"step {done}/{total}"

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float, speed: float, left: float | None) -> None:
        """Show a step that is done, and the seconds left if they are known."""
        self.progress.update(self.task, completed=step, loss=loss, speed=speed)
        self.state = f"step {step}/{self.total}  loss {loss:.3f}"
        if left is not None:
            self.state += f"  {speed:,.0f} tokens/s, about {duration(left)} left"
        self.alive()

    def doing(self, what: str) -> None:
        """Show the current phase."""
        self.progress.update(self.task, description=what)
        self.what = what

    def alive(self) -> None:
        """Write a line, where there is no terminal, if the last one is some time ago."""
        if not CONSOLE.is_terminal and self.clock() - self.written >= SILENCE:
            say(f"{self.what}: {self.state}")
            self.written = self.clock()


def table(summary: Mapping[str, Any]) -> str:
    """The results of a run as a table."""
    rows = [
        ("perplexity", number(summary["val_perplexity"], ".3f")),
        ("bits per byte", number(summary["val_bits_per_byte"], ".4f")),
        *above_entropy(summary["val_loss"], summary.get("entropy_floor")),
        ("training time", number(summary["train_seconds"], ".1f", " s")),
        ("tokens per second", number(summary["tokens_per_second"], ",.0f")),
        ("step", number(summary["step_ms"], ".1f", " ms")),
        ("attention", number(summary["attention_ms"], ".1f", " ms of it")),
        ("peak memory, training", size(summary["peak_train_bytes"])),
        ("KV cache per token", number(summary["kv_cache_bytes_per_token"], ",", " bytes")),
        ("parameters", number(summary["params"], ",")),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join(f"  {label:<{width}}  {value}" for label, value in rows)


def above_entropy(loss: float | None, floor: float | None) -> list[tuple[str, str]]:
    """A row that compares a loss with that of a perfect model, where it is known."""
    if loss is None or floor is None:
        return []
    return [("above the entropy", f"{loss - floor:.4f} nats per token")]


def columns(rows: list[list[str]]) -> str:
    """Rows as a table: the first column to the left, all others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def number(value: float | None, style: str, unit: str = "") -> str:
    return "not measured" if value is None else f"{value:{style}}{unit}"


def size(value: float | None) -> str:
    return number(None if value is None else value / 2**20, ",.1f", " MiB")


def printable(text: str) -> str:
    """Text that is safe to print: control characters are shown escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
