"""Evaluations of a sweep's runs, when all are trained: lines of its config, each as after `eval.py`."""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data.atomic import read_json, sha256, write_json
from train.record.terminal import say
from train.sweep.processes import Stop, signals

EVAL = Path(__file__).resolve().parents[2] / "eval.py"


def evaluate(folder: Path, lines: list[str]) -> int:
    """Evaluate all runs in a folder, each line in a process of its own; how many of them failed.

    Not again if lines, runs and answers are those of the last time. Raises Stop after a signal, with
    the process ended.
    """
    done = folder / "evaluated.json"
    if lines and last_time(done) == results(folder, lines):
        say(f"evaluated before: {', '.join(lines)}")
        return 0
    failed = 0
    for line in lines:
        command = [sys.executable, str(EVAL), f"run={folder}", *shlex.split(line)]
        with signals() as caught, subprocess.Popen(command, start_new_session=True) as process:
            while process.poll() is None and not caught:
                time.sleep(0.1)
            if caught:
                process.kill()
                raise Stop(caught[0])
        if process.returncode:
            failed += 1
            say(f"{line}: ended with exit code {process.returncode}")
    if lines and not failed:
        write_json(done, results(folder, lines))
    return failed


def last_time(done: Path) -> dict[str, Any] | None:
    """What `results` was then; None if that is not known."""
    try:
        return read_json(done)
    except (OSError, ValueError):
        return None


def results(folder: Path, lines: list[str]) -> dict[str, Any]:
    """What was asked, and a checksum of each run's summary and of each answer."""
    files = sorted([*folder.glob("*/summary.json"), *folder.glob("*/eval/*.json")])
    return {"lines": lines, "files": {str(f.relative_to(folder)): sha256(f) for f in files}}
