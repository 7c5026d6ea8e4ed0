"""Train one model, or a sweep of them: python train.py --help."""

import sys

from cli.entry import door
from cli.train import train

if __name__ == "__main__":
    sys.exit(door(train, sys.argv[1:]))
