"""Let a finished run write text: python sample.py --help."""

import sys

from compare.sample import sample
from train.cli import door

if __name__ == "__main__":
    sys.exit(door(sample, sys.argv[1:]))
