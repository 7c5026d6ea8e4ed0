"""Train one model, or a sweep of them: python train.py --help."""

import sys
from functools import partial

from compare.plan import forecast, plan
from compare.report import report
from train.cli import Tools, door, train

if __name__ == "__main__":
    sys.exit(door(partial(train, tools=Tools(plan, forecast, report)), sys.argv[1:]))
