"""Ask finished runs: python eval.py --help."""

import sys

from cli.entry import door
from cli.evaluate import evaluate

if __name__ == "__main__":
    sys.exit(door(evaluate, sys.argv[1:]))
