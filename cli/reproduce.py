"""`python -m cli.reproduce`: train a finished run again from its own record, and compare the curves."""

import sys
from pathlib import Path

from cli.entry import options_of, run_command
from compare.check.reproduction import reproduce

USAGE = """\
Train a finished run again from what its folder records (config, seed, threads, dtype), and compare
every loss and gradient norm.

  python -m cli.reproduce DIR [to=DIR]   to: folder of the new run; outputs/reproduced/ by default
                                         (run=DIR, if its name has an =)

With the code and the machine of then, every bit has to agree, on CUDA if it ran with
deterministic=true. Elsewhere the losses of the first ten steps have to agree within 0.1 %, and the
last validation within 0.02 nats. The run's text has to be there, and the run that it started from.
Exit code 1 if it is not reproduced.
"""


def main(arguments: list[str]) -> int:
    """`python -m cli.reproduce`: exit code 1 if the run is not reproduced."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    named = [a if "=" in a else f"run={a}" for a in arguments]  # a folder alone is the run
    if sum(a.startswith("run=") for a in named) > 1:
        raise ValueError(f"one run at a time, not {' '.join(arguments)}")
    options = options_of(named, ("run", "to"))
    if not options.get("run"):
        raise ValueError("DIR is missing: the folder of a finished run")
    run = Path(options["run"])
    to = Path(options.get("to") or Path("outputs/reproduced") / run.resolve().name)
    found = reproduce(run, to)
    print(f"\n{run}: {'' if found.reproduced else 'not '}reproduced: {found.words}")
    return 0 if found.reproduced else 1


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
