"""`python -m cli.judge`: keep a change, or discard it: a verdict for scripts and agents."""

import json
import sys
from pathlib import Path

from cli.entry import run_command
from compare.judge.question import ask
from compare.judge.rounds import Interrupted, decide

USAGE = """\
Train a change and what it changes with more and more seeds, until it can be kept or discarded, and print
one line of JSON. All else goes to stderr.

  python -m cli.judge base="KEY=VALUE ..." new="KEY=VALUE ..." minutes=30 [to=DIR] [KEY=VALUE ...]

  base      the variant to be better than, as after train.py; its runs are made once
  new       the candidate, likewise
  minutes   of wall time that this call may take
  to        folder of runs and ledger; outputs/judge/ by default. One folder is one session
  others    are for both, as after train.py: steps=200, data=text, jobs=2, and
            margin=0.01   relative difference that does not matter
            retry=true    tries runs again that failed

Example
  python -m cli.judge base="attn=mha" new="attn=gqa" pos=rope steps=200 minutes=30

The line
  verdict         keep, discard, or undecided: the same command goes on
  reason          better; worse, equal, hopeless, not settled or failed: ...; out of time
  difference      relative change of the metric, below zero is better; null without a pair of runs
  interval        its 95 % interval, by itself; null for one seed
  p               of the two-sided paired t-test
  metric          perplexity, or bits per byte where tokenizers differ
  seeds           pairs of runs
  step_time       step time of new over that of base; null where runs shared a machine
  worth           new in the compute and time of base; null unless the folder has base with 3 numbers of steps,
                  and for another learning rate or number of steps
  minutes         of this call; minutes_needed: of the next round, if undecided
  number, level   place in the ledger, and the chance at which a candidate that is no better is kept
  margin          the relative difference that did not matter when the verdict was given
  failed          whether a run of the candidate failed
  base, new       what was asked

Exit codes: 0 for any verdict; 2 bad input; 130 or 143 interrupted, and the same command goes on.
"""
KEYS = ("base", "new", "minutes", "to")


def main(arguments: list[str]) -> int:
    """`python -m cli.judge`: exit code 0 for any verdict, 128+ on a signal."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    options = {key: value for key, _, value in (a.partition("=") for a in arguments) if key in KEYS}
    both = [a for a in arguments if a.partition("=")[0] not in KEYS]
    for key in ("base", "new", "minutes"):
        if not options.get(key):
            raise ValueError(
                f'{key}=... is missing, as in base="attn=mha" new="attn=gqa" minutes=30'
            )
    folder = Path(options.get("to") or "outputs/judge")
    try:
        answer = decide(
            ask(options["base"], options["new"], both, folder),
            folder,
            in_minutes(options["minutes"]),
        )
    except Interrupted as stop:
        return int(stop.args[0])
    print(json.dumps(answer))
    return 0


def in_minutes(text: str) -> float:
    """Minutes above 0. Raises ValueError for anything else."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ValueError(f"minutes={text} must be a number above 0, such as 30")
    return minutes


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
