"""Compare finished runs and write what they say: python report.py --help."""

import sys

from compare.report import main
from train.cli import door

if __name__ == "__main__":
    sys.exit(door(main, sys.argv[1:]))
