"""What a run writes while it trains: a bar on a terminal, lines in a log file."""

import io
import re
from collections.abc import Callable
from functools import partial
from itertools import count, pairwise
from pathlib import Path

import pytest
from rich.console import Console

from train.config.schema import Config
from train.record import terminal
from train.record.terminal import Bar
from train.run import run_training


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def console(monkeypatch: pytest.MonkeyPatch, *, is_terminal: bool) -> io.StringIO:
    written = io.StringIO()
    new = Console(file=written, force_terminal=is_terminal, highlight=False, width=200)
    monkeypatch.setattr(terminal, "CONSOLE", new)
    return written


@pytest.mark.parametrize("seconds", [0.5, 3.0, 8.0, 9.5])
def test_a_log_file_gets_a_line_every_half_minute(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 30 s apart, at least 20, whether steps or the batches of a validation pass."""
    written, clock, times = console(monkeypatch, is_terminal=False), Clock(), [100.0]
    with Bar(400, 0, clock=clock) as bar:
        for step in range(1, 401):
            bar.doing("training" if step % 100 else "validating")
            clock.now += seconds
            bar.alive() if 100 <= step < 200 else bar.step(step, 2.5, 1234.0, 30.0)
            if len(written.getvalue().splitlines()) == len(times):
                times.append(clock.now)
    assert all(20 <= b - a <= 30 for a, b in pairwise(times))
    assert times[-1] > clock.now - 30
    assert "\x1b" not in written.getvalue()
    assert re.search(
        r"^training: step \d+/400  loss 2.500  1,234 tokens/s, about 30 s left$",
        written.getvalue(), re.MULTILINE,
    )  # fmt: skip


def test_a_terminal_gets_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    written, clock = console(monkeypatch, is_terminal=True), Clock()
    with Bar(10, 0, clock=clock) as bar:
        for step in range(1, 11):
            clock.now += 60
            bar.step(step, 2.5, 1234.0, None)
    assert "10/10" in written.getvalue()
    assert "step" not in written.getvalue()


def test_what_is_left_is_not_claimed_during_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    written, clock = console(monkeypatch, is_terminal=False), Clock()
    with Bar(10, 2, clock=clock) as bar:
        bar.doing("training")
        clock.now += 60
        bar.step(3, 2.5, 0.0, None)
    assert written.getvalue() == "training: step 3/10  loss 2.500\n"


def test_a_run_says_how_long_it_takes_and_that_it_is_alive(
    config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every look at the clock is a second later, and 7 s later for the lines of the log."""
    monkeypatch.setattr("train.trainer.perf_counter", partial(next, count()))
    ticks = count(step=7)
    monkeypatch.setattr("train.trainer.Bar", partial(Bar, clock=lambda: next(ticks)))
    assert run_training(config("steps=20", "eval_batch_size=1")) == 0
    lines = capsys.readouterr().err.splitlines()
    (expected,) = [line for line in lines if line.startswith("about ")]
    said = re.fullmatch(r"about (\d+) s for the other 12 steps", expected)
    assert said
    assert int(said[1]) > 12  # of validations
    assert any(re.match(r"training: step \d+/20  loss", line) for line in lines)
    assert any(re.match(r"validating: step \d+/20  loss", line) for line in lines)
    assert run_training(config("steps=20", "data.val_fraction=0", f"out={tmp_path}/b")) == 0
    assert "about 12 s for the other 12 steps" in capsys.readouterr().err
