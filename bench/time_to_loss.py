"""Which run comes to a loss first, in steps and in time: python -m bench.time_to_loss run=A,B,..."""

import contextlib
import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import quantiles
from typing import Any

from bench.step_time import successive
from cli.entry import run_command
from compare.cost.step_estimate import random_token_step
from compare.report.style import COLOURS, GREY, SETTINGS, Figure, canvas, legend, svg
from train.config.schema import choose
from train.measure import device as devices
from train.measure.timer import interleave
from train.record.run_folder import open_config, open_tokenizer
from train.record.run_log import records
from train.record.terminal import columns, duration, number

USAGE = """\
When the validation loss of runs first came to the best that the first of them ever had, or to other
losses. Runs need not have ended. Prints a table and draws outputs/race.svg.

  python -m bench.time_to_loss run=DIR,DIR,... [loss=X,Y,...] [retime=true]

Time is that of training steps, as each run's own clock has it: it compares where the runs had the
same machine, threads and company. With retime=true it is steps times what a step of the run takes
here and now: those of all recipes in turns, on random tokens, medians of 7.
"""

#: What decides how long a step takes; runs that share it, whatever their seeds, are timed once.
PACE = "attn pos model optim batch_size accumulate dtype compile memory".split()
WHERE = Path("outputs/race.svg")


@dataclass(frozen=True)
class Racer:
    """A run and its validations."""

    folder: Path
    name: str  # that it shares with others of its kind
    curve: list[tuple[int, float, float]]  # step, seconds of training, loss

    @property
    def best(self) -> tuple[int, float, float]:
        return min(self.curve, key=lambda point: point[2])

    def at(self, loss: float) -> tuple[int, float] | None:
        """Steps and seconds at the first validation with this loss or less; None if none had."""
        return next((point[:2] for point in self.curve if point[2] <= loss), None)


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
    anew = choose("retime", given.get("retime", "false"), {"true": True, "false": False})
    racers = [open_racer(Path(name)) for name in given["run"].split(",")]
    losses = [racers[0].best[2], *map(loss_of, filter(None, given.get("loss", "").split(",")))]
    if anew:
        racers = retimed(racers)
    print(columns(table(racers, losses)))
    WHERE.parent.mkdir(exist_ok=True)
    WHERE.write_text(draw(racers, losses).file, encoding="utf-8")
    print(f"\nwritten: {WHERE}")
    return 0


def loss_of(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(loss := float(text)):
            return loss
    raise ValueError(f"loss={text} is not a finite number")


def open_racer(folder: Path) -> Racer:
    """A run's validations. Raises ValueError if it has none."""
    name = open_config(folder)["name"] or folder.name
    lines = [line for line in records(folder / "metrics.jsonl") if line["split"] == "val"]
    if not lines:
        raise ValueError(f"{folder} has no validation yet")
    return Racer(folder, name, [(x["step"], x["seconds"], x["loss"]) for x in lines])


def retimed(racers: list[Racer]) -> list[Racer]:
    """The same curves, with the time that their steps take here when nothing else runs."""
    devices.set_up_process(None)
    paces, jobs = [], {}
    for racer in racers:
        config = open_config(racer.folder)
        paces.append(json.dumps({key: config[key] for key in PACE}))
        if paces[-1] not in jobs:
            vocab_size = open_tokenizer(racer.folder).get_vocab_size()
            jobs[paces[-1]] = random_token_step(config | {"init_from": None}, vocab_size)
    steps = {pace: successive(step) for pace, step in jobs.items()}
    medians = {}
    for pace, times in interleave(
        steps, next(iter(jobs.values())).device, warm_caches=True
    ).items():
        low, medians[pace], high = (1e3 * x for x in quantiles(times, n=4, method="inclusive"))
        names = ", ".join(r.folder.name for r, p in zip(racers, paces, strict=True) if p == pace)
        print(f"a step of {names}: {medians[pace]:,.0f} ms ({low:,.0f} to {high:,.0f})")
    print()
    return [
        replace(racer, curve=[(n, n * medians[pace] / 1e3, x) for n, _, x in racer.curve])
        for racer, pace in zip(racers, paces, strict=True)
    ]


def table(racers: list[Racer], losses: list[float]) -> list[list[str]]:
    """Each run's best, and when it came to the losses."""
    head = ["run", "steps", "best", "at step"]
    rows = [[*head, *(cell for loss in losses for cell in (f"to {loss:.4f}", "time"))]]
    for racer in racers:
        step, _, best = racer.best
        row = [racer.folder.name, f"{racer.curve[-1][0]:,}", f"{best:.4f}", f"{step:,}"]
        for loss in losses:
            steps, seconds = racer.at(loss) or (None, None)
            row += ["-" if steps is None else f"{steps:,}"]
            row += ["-" if seconds is None else duration(seconds)]
        rows.append(row)
    return rows


def draw(racers: list[Racer], losses: list[float]) -> Figure:
    """Validation loss against steps and against time, with the losses as lines."""
    import matplotlib

    with matplotlib.rc_context(SETTINGS):
        return drawn(racers, losses)


def drawn(racers: list[Racer], losses: list[float]) -> Figure:
    figure, panels = canvas(2, 3.4)
    kinds = list(dict.fromkeys(racer.name for racer in racers))
    for axes, what, label in ((panels[0], 0, "steps"), (panels[1], 1, "minutes of training")):
        for racer in racers:
            first = racer is next(r for r in racers if r.name == racer.name)
            place = [point[what] / (1 if what == 0 else 60) for point in racer.curve]
            colour = COLOURS[kinds.index(racer.name) % len(COLOURS)]
            style: dict[str, Any] = {"color": colour, "lw": 1.4, "alpha": 1 if first else 0.6}
            curve = [point[2] for point in racer.curve]
            axes.plot(place, curve, label=racer.name if first else None, **style)
        for loss in losses:
            axes.axhline(loss, color=GREY, lw=0.8, ls="--")
        low = min(racer.best[2] for racer in racers)
        axes.set(xlabel=label, ylabel="validation loss", ylim=(low - 0.03, low + 0.5))
    legend(panels[0], len(kinds))
    told = ", ".join(number(loss, ".4f") for loss in losses)
    return Figure("race", f"Validation loss; dashed: {told}.", svg(figure, "race"))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
