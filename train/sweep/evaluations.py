"""Evaluations of a sweep's runs, when all are trained: lines of its config, each as after `eval.py`."""

import shlex
import subprocess
import sys
import time
from pathlib import Path

from train.record.terminal import say
from train.sweep.processes import Stop, signals

EVAL = Path(__file__).resolve().parents[2] / "eval.py"


def evaluate(folder: Path, lines: list[str]) -> int:
    """Evaluate all runs in a folder, each line in a process of its own; how many of them failed.

    Raises Stop after a signal, with the process ended.
    """
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
    return failed
