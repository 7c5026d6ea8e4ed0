"""Compare finished runs: python report.py --help."""

import sys

from cli.entry import run_command
from cli.report import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
