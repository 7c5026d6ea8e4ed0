"""Generate text from a finished run: python sample.py --help."""

import sys

from cli.entry import run_command
from cli.sample import sample

if __name__ == "__main__":
    sys.exit(run_command(sample, sys.argv[1:]))
