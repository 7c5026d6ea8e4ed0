"""Train one model, or with -m a sweep of them: python train.py --help."""

import sys

from train.cli import door, train

if __name__ == "__main__":
    sys.exit(door(train, sys.argv[1:]))
