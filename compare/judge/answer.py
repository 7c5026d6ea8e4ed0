"""What the runs so far say of a candidate, as numbers for a program."""

import math
from dataclasses import dataclass
from typing import Any

from compare.judge.question import Question, variant
from compare.report.analysis import STEP_TIME, Metric, analyse, comparable_times, metric_of
from compare.report.caveats import same
from compare.report.curves.worth import worths
from compare.report.runs import Run, open_run
from compare.statistics.paired import LARGEST, Difference, mean_interval, paired
from compare.statistics.worth import BUDGETS
from train.sweep.plan import known_runs


@dataclass(frozen=True)
class Evidence:
    """The finished runs of a candidate and of the base, paired by seed."""

    question: Question
    base: dict[int, Run]
    new: dict[int, Run]
    failed: dict[str, str]  # reasons by variant, base or new, of the first run that failed

    @property
    def pairs(self) -> list[tuple[Run, Run]]:
        """New and base, by seed; up to the first seed that one of them lacks."""
        found = []
        for seed in range(len(self.new)):
            if seed not in self.new or seed not in self.base:
                break
            found.append((self.new[seed], self.base[seed]))
        return found

    @property
    def metric(self) -> Metric:
        """Perplexity, or bits per byte across tokenizers. Raises ValueError across corpora."""
        done = [run for pair in self.pairs for run in pair]
        found = metric_of(done)
        if found is None:
            several = not same(done, "data_fingerprint")
            why = "were trained on different text" if several else "have no loss"
            raise ValueError(f"base and new {why}, and no measure compares them")
        return found

    @property
    def differences(self) -> list[float]:
        """Scores of new minus base, by seed; lower is better."""
        if not self.pairs:
            return []
        score = self.metric.score
        found = [(score(new), score(base)) for new, base in self.pairs]
        return [a - b for a, b in found if a is not None and b is not None]

    @property
    def failure(self) -> str | None:
        """Why the candidate cannot be judged, if one of its runs failed.

        Raises ValueError if it is the base that has no score.
        """
        if self.pairs and None in [self.metric.score(base) for _, base in self.pairs]:
            raise ValueError("a run of the base has no finite loss")
        if len(self.differences) < len(self.pairs):
            return "a run has no finite loss"
        return self.failed.get("new")


def evidence(question: Question) -> Evidence:
    """Read the runs last asked for."""
    done: dict[str, dict[int, Run]] = {}
    failed: dict[str, str] = {}
    for name, folders in zip(("base", "new"), question.folders(), strict=True):
        runs = {seed: open_run(folder, {}) for seed, folder in folders.items()}
        done[name] = {seed: run for seed, run in runs.items() if run.done}
        for run in runs.values():
            if run.status["state"] == "failed":
                failed.setdefault(name, f"{run.folder.name}: {run.status['reason']}")
    return Evidence(question, done["base"], done["new"], failed)


def numbers(found: Evidence) -> dict[str, Any]:
    """Difference, interval, cost and worth, as far as there are runs for them."""
    values = found.differences
    return {
        "metric": found.metric.name if values else None,
        **relative(paired(values) if values else None),
        "seeds": len(values),
        "step_time": step_time(found),
        "worth": worth(found) if values else None,
    }


def relative(d: Difference | None) -> dict[str, Any]:
    """A difference in scores as a change of the measure: -0.012 is 1.2 % lower."""
    if d is None:
        return {"difference": None, "interval": None, "p": None}
    ends = None if d.low is None or d.high is None else [change(d.low), change(d.high)]
    return {"difference": change(d.mean), "interval": ends, "p": d.p}


def change(difference: float) -> float | None:
    """A difference of logarithms as a relative change; None beyond what a number holds."""
    return math.expm1(difference) if difference < LARGEST else None


def step_time(found: Evidence) -> float | None:
    """The step time of new over that of base; None where the runs' times do not compare."""
    if not found.pairs or not comparable_times([run for pair in found.pairs for run in pair]):
        return None
    logs = [(STEP_TIME(new), STEP_TIME(base)) for new, base in found.pairs]
    ratios = [a - b for a, b in logs if a is not None and b is not None]
    return math.exp(mean_interval(ratios)[0]) if ratios else None


def worth(found: Evidence) -> dict[str, Any] | None:
    """What new is worth in the base's compute and time, see `compare.statistics.worth`.

    None unless the folder has runs of the base with at least three numbers of steps.
    """
    base = found.question.first["steps"]
    ladder = []
    for name, entry in known_runs(found.question.runs).items():
        same = variant(entry["config"] | {"steps": base}) == found.question.names[0]
        if same and (run := open_run(found.question.runs / name, entry["config"])).done:
            ladder.append(run)
    if len({run.config["steps"] for run in ladder}) < BUDGETS:
        return None
    ladder.sort(key=lambda run: run.config["steps"] != base)  # its own runs are the baseline
    new = list(found.new.values())
    judged = [w for w in worths(analyse([*ladder, *new])) if w.steps == [new[0].config["steps"]]]
    if not judged:
        return None
    (one,) = judged
    return {"compute": factor(one.compute), "time": factor(one.time), "refused": one.refused}


def factor(d: Difference | None) -> dict[str, Any] | None:
    """A ratio, from its logarithm, with its interval."""
    if d is None:
        return None
    low, mean, high = (
        None if x is None or x > LARGEST else math.exp(x) for x in (d.low, d.mean, d.high)
    )
    return {"factor": mean, "interval": None if d.low is None else [low, high]}
