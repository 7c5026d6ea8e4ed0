"""`python train.py`: train one model or a sweep of models, or estimate their cost."""

import gc
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cli.entry import help_page
from train.config.compose import keys_set
from train.config.options import Reporting
from train.config.schema import Config, fits
from train.config.schema import arguments as checked
from train.setup.match import compose_matched
from train.sweep.expand import ROUNDS, cell_names, cells_of, settings_of, stages_of, with_seeds

USAGE = """\
Train a small decoder-only language model with the chosen attention and position scheme, and record
its quality, time and memory.

  python train.py [KEY=VALUE ...]            one run
  python train.py -m KEY=A,B,C [...]         a sweep: every combination, each in its own process
  python train.py plan=true [...]            the cost of one run, or with -m a sweep, without training

Examples
  python train.py attn=gqa pos=rope
  python train.py attn=gqa attn.n_kv_heads=1 data=text data.path="my/*.txt" steps=1e3
  python train.py -m name=mine attn=mha,gqa,mqa pos=learned,rope seed=0,1,2
  python train.py experiment=grid            a sweep defined in a config
  python train.py -m name=mine attn=mha,mqa match=params hydra/launcher=submitit_slurm
  python train.py out=outputs/runs/mine resume=true
"""


def train(arguments: list[str]) -> int:
    """`python train.py`: exit code 0 done, 1 a sweep with failed runs, 3 stopped, 128+ on a signal."""
    if {"-h", "--help"} & set(arguments):
        print(help_page(USAGE, "train"))
        return 0
    flags = {a for a in arguments if a in ("-m", "--multirun")}
    launcher = [a for a in arguments if a.lstrip("+").startswith("hydra")]
    overrides = [a for a in arguments if a not in flags and a not in launcher]
    if {"steps", "minutes"} <= keys_set(overrides):
        raise ValueError("minutes chooses the number of steps: give steps or minutes, not both")
    cells = cells_of(overrides, multirun=bool(flags))
    first = compose_matched(cells[0])
    if not fits(first["plan"], bool):
        raise ValueError(f"plan={first['plan']} is not true or false")
    reporting = Reporting(**checked("report", first["report"], Reporting)[0])
    settings = settings_of(first)
    if settings.seeds and reporting.claim:
        raise ValueError(
            "seeds=auto looks before it adds seeds; those of a claim are written before"
        )
    if settings.seeds:
        cells = with_seeds(cells)
    check_evaluations(reporting.evaluate, str(first["out"] or ""))
    if first["plan"]:
        from compare.cost.plan import plan
        from train.record.terminal import say

        if settings.seeds:
            say(f"seeds=auto: at most as many runs as this, with {ROUNDS[-1]} seeds")
        runs = [stage for cell in cells for stage in stages_of(cell, first)]
        configs = [compose_matched(cell) for cell in runs]
        return plan(list(zip(cell_names(runs), configs, strict=True)))
    if flags or len(cells) > 1 or first["stages"] is not None:
        from train.sweep.run import sweep

        return sweep(cells, settings, launcher, forecast, report, undecided)
    if launcher:
        raise ValueError(f"{launcher[0]}: a launcher is for sweeps (-m)")
    from train.parallel.parent import end_with_parent
    from train.record.wandb_process import import_early

    end_with_parent()
    import_early(first["wandb"])
    from train.run import run_training  # takes a second: torch

    gc.freeze()  # what is imported stays: no collection has to look at it again, at the end either
    return run_training(first)


def check_evaluations(lines: list[str], folder: str) -> None:
    """Raise ValueError for a line of `report.evaluate` that `eval.py` would refuse, whatever the runs."""
    if lines and "," in folder:
        raise ValueError(f"report.evaluate: eval.py takes {folder} for several folders; no commas")
    for line in lines:
        from cli.evaluate import opened

        try:
            opened([*shlex.split(line), "run=."])
        except ValueError as error:
            raise ValueError(f"report.evaluate, {line!r}: {error}") from error


def forecast(
    runs: list[tuple[str, Config]], jobs: int, apart: Callable[..., Any]
) -> dict[str, float]:
    """The seconds that runs may take, see `compare.cost.plan.forecast`; timed `apart` from this process."""
    from compare.cost.plan import forecast as timed

    seconds: dict[str, float] = apart(timed, runs, jobs)
    return seconds


def report(folder: Path) -> str:
    """Write the report of a sweep, see `compare.report.write`; first after some of its runs."""
    from compare.report.write import report as write  # pandas and matplotlib take seconds to import

    return write(folder)


def undecided(folder: Path) -> list[str]:
    """The runs of a sweep whose questions need more seeds, see `compare.statistics.sequential`."""
    from compare.report.analysis import undecided as find

    return find(folder)
