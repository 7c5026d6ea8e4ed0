"""Let a finished run write text: python sample.py --help."""

import sys

from cli.entry import door
from cli.sample import sample

if __name__ == "__main__":
    sys.exit(door(sample, sys.argv[1:]))
