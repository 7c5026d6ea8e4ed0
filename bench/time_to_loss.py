"""Steps and time to a validation loss: python -m bench.time_to_loss run=A,B,..."""

import contextlib
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles

from bench.step_time import successive
from cli.entry import run_command
from compare.report.style import COLOURS, GREY, Drawing, canvas, legend, pictured
from train.config.keys import STEP_TIME, select
from train.config.schema import choose
from train.measure import device as devices
from train.measure.timer import interleave
from train.record.run_folder import open_config, open_tokenizer
from train.record.run_log import records
from train.record.terminal import columns, duration, number
from train.step_estimate import random_token_step

USAGE = """\
When the validation loss of each run first reached the best loss of the first run, or other losses.
Runs may still be training. Prints a table and draws outputs/time_to_loss.svg.

  python -m bench.time_to_loss run=DIR,DIR,... [loss=X,Y,...] [retime=true]

Time is that of training steps as the runs recorded it: comparable if they used the same machine and
thread count and ran alone. With retime=true it is the number of steps times the time of a step here
and now: one of each recipe, interleaved, on random tokens, medians of 7.
"""

OUTPUT = Path("outputs/time_to_loss.svg")


@dataclass(frozen=True)
class RunCurve:
    """The validations of a run."""

    folder: Path
    name: str  # shared by the runs of a recipe
    points: list[tuple[int, float, float]]  # step, seconds of training, loss

    @property
    def best(self) -> tuple[int, float, float]:
        return min(self.points, key=lambda point: point[2])

    def first_at(self, loss: float) -> tuple[int, float] | None:
        """Steps and seconds at the first validation with at most this loss; None if there is none."""
        return next((point[:2] for point in self.points if point[2] <= loss), None)


def main(arguments: list[str]) -> int:
    """`python -m bench.time_to_loss`."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if "run" not in given or given.keys() - {"run", "loss", "retime"}:
        raise ValueError(
            "python -m bench.time_to_loss run=DIR,DIR,... [loss=X,Y,...] [retime=true]"
        )
    retime = choose("retime", given.get("retime", "false"), {"true": True, "false": False})
    runs = [open_curve(Path(name)) for name in given["run"].split(",")]
    losses = [runs[0].best[2], *map(loss_of, filter(None, given.get("loss", "").split(",")))]
    if retime:
        runs = retimed(runs)
    print(columns(table(runs, losses)))
    draw(runs, losses).write(OUTPUT)
    return 0


def loss_of(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(loss := float(text)):
            return loss
    raise ValueError(f"loss={text} is not a finite number")


def open_curve(folder: Path) -> RunCurve:
    """The validations of a run. Raises ValueError if it has none."""
    name = open_config(folder)["name"] or folder.name
    lines = [line for line in records(folder / "metrics.jsonl") if line["split"] == "val"]
    if not lines:
        raise ValueError(f"{folder} has no validation yet")
    return RunCurve(folder, name, [(x["step"], x["seconds"], x["loss"]) for x in lines])


def retimed(runs: list[RunCurve]) -> list[RunCurve]:
    """The same curves, with seconds from the time of a step on this machine."""
    devices.set_up_process(None)
    recipes, steps = [], {}
    for run in runs:
        config = open_config(run.folder)
        vocab_size = open_tokenizer(run.folder).get_vocab_size()
        recipes.append(json.dumps([select(config, STEP_TIME), vocab_size]))
        if recipes[-1] not in steps:
            steps[recipes[-1]] = random_token_step(config | {"init_from": None}, vocab_size)
    device = next(iter(steps.values())).device
    calls = {recipe: successive(step) for recipe, step in steps.items()}
    step_ms = {}
    for recipe, seconds in interleave(calls, device, warm_caches=True).items():
        low, step_ms[recipe], high = (1e3 * q for q in quantiles(seconds, n=4, method="inclusive"))
        names = ", ".join(r.folder.name for r, c in zip(runs, recipes, strict=True) if c == recipe)
        print(f"a step of {names}: {step_ms[recipe]:,.0f} ms ({low:,.0f} to {high:,.0f})")
    print()
    return [
        replace(run, points=[(n, n * step_ms[recipe] / 1e3, loss) for n, _, loss in run.points])
        for run, recipe in zip(runs, recipes, strict=True)
    ]


def table(runs: list[RunCurve], losses: list[float]) -> list[list[str]]:
    """The best loss of each run, and the steps and time to each of the losses."""
    head = ["run", "steps", "best", "at step"]
    rows = [[*head, *(cell for loss in losses for cell in (f"to {loss:.4f}", "time"))]]
    for run in runs:
        step, _, best = run.best
        row = [run.folder.name, f"{run.points[-1][0]:,}", f"{best:.4f}", f"{step:,}"]
        for loss in losses:
            reached = run.first_at(loss)
            row += [f"{reached[0]:,}", duration(reached[1])] if reached else ["-", "-"]
        rows.append(row)
    return rows


@pictured("time_to_loss")
def draw(runs: list[RunCurve], losses: list[float]) -> Drawing:
    """Validation loss against steps and against time, with the losses as dashed lines."""
    names = list(dict.fromkeys(run.name for run in runs))
    lowest = min(run.best[2] for run in runs)
    figure, panels = canvas(2, 3.4)
    for axes, i, unit, label in (
        (panels[0], 0, 1, "steps"),
        (panels[1], 1, 60, "minutes of training"),
    ):
        labelled = set[str]()
        for run in runs:
            x = [point[i] / unit for point in run.points]
            y = [point[2] for point in run.points]
            colour = COLOURS[names.index(run.name) % len(COLOURS)]
            first = run.name not in labelled
            labelled.add(run.name)
            text, alpha = (run.name, 1) if first else (None, 0.6)
            axes.plot(x, y, label=text, color=colour, lw=1.4, alpha=alpha)
        for loss in losses:
            axes.axhline(loss, color=GREY, lw=0.8, ls="--")
        axes.set(xlabel=label, ylabel="validation loss", ylim=(lowest - 0.03, lowest + 0.5))
    legend(panels[0], len(names))
    values = ", ".join(number(loss, ".4f") for loss in losses)
    caption = f"Validation loss; dashed: {values}."
    return figure, caption


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
