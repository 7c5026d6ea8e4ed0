"""Evaluate finished runs: python eval.py --help."""

import sys

from cli.entry import run_command
from cli.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(run_command(evaluate, sys.argv[1:]))
