"""Faults by the hundred: make faults, or python tests/campaign.py [NAME=TRIALS ...] [seed=0].

  kills      SIGKILLs at random moments, in forks of a warmed process
  commands   the same to the real command
  crashes    deaths at each write of a save (every so many: 1)
  flips      bits flipped in checkpoints and cached tokens
  cuts       files of them cut short
  configs    random configs
  files      random bad files as data
  gadgets    names of code where configs name parts of ours
  pickles    pickles in place of a run's files

Prints a table and writes outputs/faults.json; exit code 1 if anything was found. NAME=0 leaves one out.
"""

import json
import platform
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from damage import cuts, flips
from fuzz import configs, files
from hostile import gadgets, pickles
from kills import Tally, commanded, crashes, random_kills, scene

from train.progress import columns, say

TRIALS = {
    "kills": 500,
    "commands": 50,
    "crashes": 1,
    "flips": 1000,
    "cuts": 200,
    "configs": 2000,
    "files": 100,
    "gadgets": 1,
    "pickles": 1,
}


def main(arguments: list[str]) -> int:
    """Run the campaigns; exit code 1 if one found something."""
    asked = {"seed": 0} | {k: int(v) for k, _, v in (a.partition("=") for a in arguments)}
    if unknown := asked.keys() - TRIALS.keys() - {"seed"}:
        print(__doc__, f"error: no such campaign: {', '.join(unknown)}", sep="\n", file=sys.stderr)
        return 2
    trials, seed = TRIALS | asked, asked["seed"]
    found: dict[str, tuple[Tally, float]] = {}
    with scene() as here:
        campaigns = {
            "kills": lambda n: random_kills(here, n, seed),
            "commands": lambda n: random_kills(here, n, seed, commanded, longest=8.0),
            "crashes": lambda n: crashes(here, every=n),
            "flips": lambda n: flips(here, n, seed),
            "cuts": lambda n: cuts(here, n, seed),
            "configs": lambda n: configs(n, seed),
            "files": lambda n: files(n, seed, here.folder),
            "gadgets": lambda n: gadgets(here),
            "pickles": lambda n: pickles(here),
        }
        for name, campaign in campaigns.items():
            if trials[name]:
                say(f"{name} ...")
                start = time.monotonic()
                found[name] = campaign(trials[name]), time.monotonic() - start
    rows = [["campaign", "trials", "faults", "seconds", ""]]
    for name, (tally, seconds) in found.items():
        notes = ", ".join(f"{times} {what}" for what, times in sorted(tally.notes.items()))
        rows.append([name, f"{tally.trials}", f"{len(tally.faults)}", f"{seconds:.0f}", notes])
        for fault in tally.faults[:20]:
            say(f"{name}: {fault}")
    print(columns(rows))
    about = {"date": time.strftime("%Y-%m-%d"), "platform": platform.platform(), "seed": seed}
    content = {name: vars(tally) | {"seconds": s} for name, (tally, s) in found.items()}
    into = ROOT / "outputs/faults.json"
    into.parent.mkdir(exist_ok=True)
    into.write_text(json.dumps(about | {"campaigns": content}, indent=1) + "\n")
    return 1 if any(tally.faults for tally, _ in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
