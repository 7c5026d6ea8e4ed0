"""Evaluations of a sweep's runs, when all are trained: lines of its config, each as after `eval.py`."""

import shlex
import subprocess
import sys
from pathlib import Path

from train.record.terminal import say

EVAL = Path(__file__).resolve().parents[2] / "eval.py"


def evaluate(folder: Path, lines: list[str]) -> int:
    """Evaluate all runs in a folder, each line in a process of its own; how many of them failed."""
    failed = 0
    for line in lines:
        command = [sys.executable, str(EVAL), f"run={folder}", *shlex.split(line)]
        if code := subprocess.run(command, check=False).returncode:
            failed += 1
            say(f"{line}: ended with exit code {code}")
    return failed
