"""Compare finished runs and write what they say: python report.py --help."""

import sys

from cli.entry import door
from cli.report import main

if __name__ == "__main__":
    sys.exit(door(main, sys.argv[1:]))
