"""What a person sees of a run: a live bar on a terminal, few lines in a log file, a table at the end."""

from collections.abc import Iterable, Mapping
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
    """Steps done, loss, tokens per second and time left, live on a terminal and absent elsewhere."""

    def __init__(self, total: int, done: int) -> None:
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

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, step: int, loss: float, speed: float) -> None:
        self.progress.update(self.task, completed=step, loss=loss, speed=speed)

    def doing(self, what: str) -> None:
        """Show the current phase."""
        self.progress.update(self.task, description=what)


def table(summary: Mapping[str, Any]) -> str:
    """The results of a run as a table."""
    rows = [
        ("perplexity", number(summary["val_perplexity"], ".3f")),
        ("bits per byte", number(summary["val_bits_per_byte"], ".4f")),
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
