"""Faults by the hundred: make faults, or python tests/faults/campaign.py [NAME=TRIALS ...] [seed=0].

  kills      SIGKILLs at random moments, in forks of a warmed process
  commands   the same to the real command
  ranks      the same to one of the two processes of a run
  crashes    deaths at each write of a save (every so many: 1)
  flips      bits flipped in checkpoints and cached tokens
  cuts       files of them cut short
  configs    random configs, composed, checked and, if they are small, trained for a step
  asked      the same to the real command, with steps=0
  files      random bad files as data
  gadgets    names of code where configs name parts of ours
  pickles    pickles in place of a run's files

Prints a line for each and writes outputs/faults.json; exit code 1 if anything was found. NAME=0 leaves
one out.
"""

import json
import platform
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

sys.path[:0] = [str(Path(__file__).resolve().parents[n]) for n in (2, 1)]  # the project, tests/

from damage import cuts, flips
from fuzz import commanded_configs, configs, files
from hostile import gadgets, pickles
from kills import ROOT, Tally, commanded, crashes, in_two, one_of, random_kills, scene

from train.measure.device import cpu_name
from train.record.terminal import CONSOLE, printable

TRIALS = {
    "kills": 500,
    "commands": 50,
    "ranks": 20,
    "crashes": 1,
    "flips": 1000,
    "cuts": 200,
    "configs": 2000,
    "asked": 50,
    "files": 100,
    "gadgets": 1,
    "pickles": 1,
}
COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}: {task.completed:.0f} trials, {task.fields[faults]} faults"),
    TimeElapsedColumn(),
)


def main(arguments: list[str]) -> int:
    """Run the campaigns; exit code 1 if any found a fault."""
    asked = {"seed": 0} | {k: int(v) for k, _, v in (a.partition("=") for a in arguments)}
    if unknown := asked.keys() - TRIALS.keys() - {"seed"}:
        print(__doc__, f"error: no such campaign: {', '.join(unknown)}", sep="\n", file=sys.stderr)
        return 2
    trials, seed = TRIALS | asked, asked["seed"]
    found: dict[str, dict[str, Any]] = {}
    with scene() as here:
        campaigns = {
            "kills": lambda n: random_kills(here, n, seed),
            "commands": lambda n: random_kills(here, n, seed, commanded, longest=8.0),
            "ranks": lambda n: random_kills(here, n, seed, in_two, longest=10.0, victim=one_of),
            "crashes": lambda n: crashes(here, every=n),
            "flips": lambda n: flips(here, n, seed),
            "cuts": lambda n: cuts(here, n, seed),
            "configs": lambda n: configs(n, seed),
            "asked": lambda n: commanded_configs(n, seed, here.folder),
            "files": lambda n: files(n, seed, here.folder),
            "gadgets": lambda n: gadgets(here),
            "pickles": lambda n: pickles(here),
        }
        for name, campaign in campaigns.items():
            if trials[name]:
                start = time.monotonic()
                with Progress(*COLUMNS, console=CONSOLE, disable=not CONSOLE.is_terminal) as bar:
                    task = bar.add_task(name, total=None, faults=0)
                    Tally.seen = staticmethod(partial(show, bar, task))
                    tally = campaign(trials[name])
                found[name] = vars(tally) | {"seconds": round(time.monotonic() - start)}
                print(told(name, found[name]), flush=True)
                write(found, seed)
    return 1 if any(result["faults"] for result in found.values()) else 0


def show(bar: Progress, task: TaskID, tally: Tally) -> None:
    """A campaign's trials and faults so far."""
    bar.update(task, completed=tally.trials, faults=len(tally.faults))


def told(name: str, result: dict[str, Any]) -> str:
    """A campaign in one line, and a line for each of its first faults."""
    notes = "".join(f", {times} {what}" for what, times in sorted(result["notes"].items()))
    line = (
        f"{name}: {result['trials']} trials, {len(result['faults'])} faults, {result['seconds']} s"
    )
    return "\n".join([line + notes, *(printable(f"  {fault}") for fault in result["faults"][:20])])


def write(found: dict[str, dict[str, Any]], seed: int) -> None:
    """Write the results so far to outputs/faults.json."""
    machine = {"cpu": cpu_name(), "platform": platform.platform(), "torch": torch.__version__}
    about = {"date": time.strftime("%Y-%m-%d"), "seed": seed, **machine}
    into = ROOT / "outputs/faults.json"
    into.parent.mkdir(exist_ok=True)
    into.write_text(json.dumps(about | {"campaigns": found}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
