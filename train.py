"""Train one model, or a sweep of them: python train.py --help."""

import sys

from cli.entry import run_command
from cli.train import train

if __name__ == "__main__":
    sys.exit(run_command(train, sys.argv[1:]))
