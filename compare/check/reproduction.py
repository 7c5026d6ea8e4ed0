"""A finished run, trained again from its own record: are its numbers those of its code and config?"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.atomic import read_json
from train.config.schema import Config
from train.record.run_folder import load_summary, open_config
from train.record.run_log import CHANGES, git_commit, records
from train.run import SAME_BITS, run_training

#: With the code, all that the bits follow from; a run that is resumed keeps its dtype.
FACTS = (*SAME_BITS, "dtype", "deterministic", "processes")
TEXT = ("data_fingerprint", "tokenizer_sha256")  # of the summary
EARLY_STEPS = 10  # in which rounding that differs has not grown yet
#: Largest relative difference of their losses, elsewhere; another seed has ten times that.
EARLY = 0.001
LAST = 0.02  # largest difference of the last validation loss, in nats, elsewhere


@dataclass(frozen=True)
class Verdict:
    """Whether a run was reproduced, and how, in a sentence."""

    reproduced: bool
    words: str


def reproduce(folder: Path, to: Path) -> Verdict:
    """Train a run again into another folder, and compare the curves.

    Bit for bit where code and machine are those of then; elsewhere the first losses within EARLY and
    the last validation within LAST. Raises ValueError for a run that is not finished, a folder that is
    taken, and what cannot be trained here.
    """
    config, summary = open_config(folder), load_summary(folder)
    if summary is None:
        raise ValueError(f"{folder} is not a finished run: it has no summary.json")
    if to.exists():
        raise ValueError(f"to={to} exists; choose a new folder")
    before = read_json(folder / "environment.json")
    code = run_training(as_then(config, before) | {"out": str(to)})
    if code:
        return Verdict(False, f"training again ended with exit code {code}, see {to}")
    again = load_summary(to) or {}
    changed = [key for key in TEXT if summary.get(key) != again.get(key)]
    if changed:
        return Verdict(False, f"the text is another: {', '.join(changed)} differs")
    now = read_json(to / "environment.json")
    differences = [
        f"{key} {before[key]} then, {now[key]} now"
        for key in FACTS
        if key in before and before[key] != now[key]
    ]
    if not now["deterministic"]:
        differences.append("without deterministic=true, this device adds in any order")
    then, commit = before.get("git_commit"), git_commit()
    if then != commit:
        differences.append(f"code {str(then)[:12]} then, {str(commit)[:12]} now")
    elif commit is None or commit.endswith(CHANGES):
        differences.append(f"code with changes that are not committed, or outside git ({commit})")
    return verdict(curve(folder), curve(to), differences)


def as_then(config: Config, environment: Mapping[str, Any]) -> Config:
    """The config of a run, with what `auto` came to, and without what its numbers do not need."""
    kept = {key: environment[key] for key in ("threads", "dtype") if key in environment}
    if environment.get("processes", 1) != config["gpus"]:
        kept["gpus"] = 1  # torchrun started them; a sum of two is the same in one process
    mirror = config["wandb"] | {"mode": "disabled"}
    kept |= {"minutes": None, "steps": config["steps"]}  # which `minutes` came to
    return config | kept | {"resume": False, "save_every": None, "wandb": mirror}


def curve(folder: Path) -> dict[tuple[int, str], tuple[float, float | None]]:
    """Loss and gradient norm of every record of a run, by step and split."""
    return {
        (record["step"], record["split"]): (record["loss"], record.get("grad_norm"))
        for record in records(folder / "metrics.jsonl")
    }


def verdict(
    then: Mapping[tuple[int, str], tuple[float, float | None]],
    now: Mapping[tuple[int, str], tuple[float, float | None]],
    differences: list[str],
) -> Verdict:
    """What two curves say; `differences` are those of code and machine."""
    shared = sorted(then.keys() & now.keys())
    if not shared:
        return Verdict(False, "no step was recorded in both")
    unlike = [at for at in shared if then[at] != now[at]]
    if not unlike and max(then) == max(now):
        where = f" although {'; '.join(differences)}" if differences else ""
        both = " that both have" * (then.keys() != now.keys())  # some were recorded more seldom
        return Verdict(True, f"bit for bit, in all {len(shared)} records{both}{where}")
    if not differences:
        same = "the same machine and code, but"
        if not unlike:
            return Verdict(
                False, f"{same} the last record is of step {max(now)[0]}, not {max(then)[0]}"
            )
        step, split = unlike[0]
        return Verdict(False, f"{same} {split} differs at step {step}")
    early = max(
        (
            abs(math.log(now[at][0] / then[at][0]))
            for at in shared
            if at[0] <= EARLY_STEPS and min(now[at][0], then[at][0]) > 0
        ),
        default=0.0,
    )
    ends = [at for at in shared if at[1] == "val"] or shared
    last = now[ends[-1]][0] - then[ends[-1]][0]
    well = early <= EARLY and abs(last) <= LAST
    return Verdict(
        well,
        f"{'within' if well else 'outside'} the bounds for another machine or code: losses of the first "
        f"{EARLY_STEPS} steps differ by {early:.3%} ({EARLY:.1%} allowed), the last one by {last:+.4f} "
        f"nats ({LAST:g} allowed); {'; '.join(differences)}",
    )
