"""Train one model, or with -m a sweep of them: python train.py --help."""

import sys
from functools import partial

from compare.plan import plan
from train.cli import door, train

if __name__ == "__main__":
    sys.exit(door(partial(train, plan=plan), sys.argv[1:]))
