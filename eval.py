"""Ask finished runs: python eval.py --help."""

import sys

from compare.evaluate import evaluate
from train.cli import door

if __name__ == "__main__":
    sys.exit(door(evaluate, sys.argv[1:]))
