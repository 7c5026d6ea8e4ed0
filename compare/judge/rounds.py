"""Rounds of seeds of a candidate and the base, until a word on it, or the end of the time."""

import math
import shlex
import statistics
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from compare.cost.plan import OVERHEAD, forecast
from compare.judge.answer import evidence, numbers
from compare.judge.ledger import OPEN, Entry, Ledger
from compare.judge.limit import Limit, limited
from compare.judge.question import Question, variant
from compare.statistics.online import LOOKS, judge
from train.config.schema import Config
from train.record.run_folder import load_manifest, load_summary
from train.record.terminal import say
from train.sweep.display import Watched, done_part, glance
from train.sweep.run import locked, state, sweep

Runs = list[tuple[str, Config]]


class Interrupted(Exception):
    """A signal ended the runs; they have saved. The argument is the exit code."""


class TooLong(Exception):
    """A round would take longer than the time that is left: so many seconds."""


def decide(question: Question, folder: Path, minutes: float) -> dict[str, Any]:
    """The answer to a question, from the ledger of the folder or from runs within the minutes.

    Raises ValueError for what cannot be trained, for a base that failed, and if another process has the
    folder; Interrupted after a signal.
    """
    with limited(60 * minutes) as limit:
        names = question.names
        lock = locked(folder)
        try:
            ledger = Ledger(folder)
            entry = ledger.entry(*names)
            if entry.verdict != OPEN and not again(question, entry):
                say(f"candidate {entry.number} was judged before")
                return entry.answer
            return pursue(question, ledger, entry, limit)
        finally:
            lock.release()


def again(question: Question, entry: Entry) -> bool:
    """Whether a candidate whose run failed is to be tried again."""
    return question.settings.retry and bool(entry.answer["failed"])


def pursue(question: Question, ledger: Ledger, entry: Entry, limit: Limit) -> dict[str, Any]:
    """Train round after round, look, and write down the word."""
    margin, noise = math.log1p(question.settings.margin), ledger.noise(entry)
    needs = None
    for seeds in LOOKS:
        try:
            train(question, seeds, limit)
        except TooLong as error:
            needs = error.args[0]
        found = evidence(question)
        if reason := found.failed.get("base"):
            raise ValueError(f"the base failed, and retry=true tries it again: {reason}")
        word = judge(found.differences, margin, entry.level, noise, len(entry.differences))
        if needs is not None or found.failure or (word and word.verdict != "open"):
            break
    verdict, reason = OPEN, "out of time"
    if found.failure:
        verdict, reason = "discard", f"failed: {found.failure}"
    elif word and word.verdict != "open":
        verdict, reason, needs = word.verdict, word.reason, None
    answer = {
        "verdict": verdict,
        "reason": reason,
        **numbers(found),
        "minutes": round(limit.used / 60, 2),
        "minutes_needed": None if needs is None else round(needs / 60, 2),
        "number": entry.number,
        "level": entry.level,
        "margin": question.settings.margin,
        "failed": found.failure is not None,
        "base": shlex.join(question.base),
        "new": shlex.join(question.new),
    }
    ledger.conclude(entry, verdict, found.differences, answer)
    return answer


def train(question: Question, seeds: int, limit: Limit) -> None:
    """Train what base and new lack of so many seeds.

    Raises TooLong, before it starts or with all saved, if the time does not suffice.
    """
    gate = Gate(question.runs, limit)
    with redirect_stdout(sys.stderr):
        code = sweep(question.cells(seeds), question.settings, [], gate, no_report, no_more)
    if limit.stopped.is_set() and code > 1:
        raise TooLong(gate.needs(unfinished(question.runs)))
    if code > 1:
        raise Interrupted(code)


class Gate:
    """The seconds that runs are expected to take; closed to those that would not end in time."""

    def __init__(self, folder: Path, limit: Limit) -> None:
        self.folder, self.limit = folder, limit
        self.jobs = 1  # at a time
        self.forecast: dict[str, float] = {}

    def __call__(self, runs: Runs, jobs: int, apart: Callable[..., Any]) -> dict[str, float]:
        """By name. Raises TooLong if they do not end within the limit.

        From those that finished; without any, from the timing of a few steps, apart from this process.
        """
        self.jobs = jobs
        self.forecast = seconds_left(self.folder, runs) or apart(forecast, runs, jobs)
        needs = sum(self.forecast.values()) / jobs
        if needs > self.limit.left:
            raise TooLong(needs)
        return self.forecast

    def needs(self, runs: Runs) -> float:
        """The seconds that runs will still take together, as far as can be told."""
        left = seconds_left(self.folder, runs) or self.forecast
        return (sum(left.values()) or OVERHEAD * len(runs)) / self.jobs


def seconds_left(folder: Path, runs: Runs) -> dict[str, float]:
    """The seconds that runs will still take, by name; empty if none of these variants has a pace yet."""
    paces = pace(folder)
    if not paces:
        return {}
    usual = statistics.fmean(paces.values())
    return {
        name: paces.get(variant(config), usual) * (1 - done_part(*watched(folder, name, config)))
        for name, config in runs
    }


def pace(folder: Path) -> dict[str, float]:
    """The median seconds of a whole run of each variant last asked for, as far as one has started."""
    seconds: dict[str, list[float]] = {}
    for name, config in cells(folder):
        run, found = watched(folder, name, config)
        if took := (load_summary(run.folder) or {}).get("wall_seconds"):
            seconds.setdefault(variant(config), []).append(OVERHEAD + took)
        elif found["left"]:
            seconds.setdefault(variant(config), []).append(
                found["left"] / (1 - done_part(run, found))
            )
    return {name: statistics.median(values) for name, values in seconds.items()}


def cells(folder: Path) -> Runs:
    """Name and config of the runs last asked for."""
    return [(cell["name"], cell["config"]) for cell in load_manifest(folder)["cells"]]


def unfinished(folder: Path) -> Runs:
    """The runs last asked for that go on when asked for again."""
    over = ("done", "failed")
    return [run for run in cells(folder) if state(folder / run[0])["state"] not in over]


def watched(folder: Path, name: str, config: Config) -> tuple[Watched, dict[str, Any]]:
    """A run, and how it stands."""
    run = Watched(name, folder / name, config["steps"])
    return run, glance(run)


def no_report(_: Path) -> str:
    return ""


def no_more(_: Path) -> list[str]:
    return []
