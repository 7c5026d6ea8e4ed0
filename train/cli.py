"""What the command line asks for: one run, or a sweep of them, or help."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train import sweep as sweeps
from train.config import CONFIGS, Config, choices_of, compose, fits, keys_of
from train.match import compose_matched

USAGE = """\
Train a small decoder-only language model with the attention and the positions of your choice,
and record what it cost and what it bought.

  python train.py [KEY=VALUE ...]            one run
  python train.py -m KEY=A,B,C [...]         a sweep: every combination, each in its own process
  python train.py plan=true [...]            what one run, or with -m a sweep, would cost

Examples
  python train.py attn=gqa pos=rope
  python train.py attn=gqa attn.n_kv_heads=1 data=text data.path="my/*.txt" steps=1e3
  python train.py -m name=mine attn=mha,gqa,mqa pos=learned,rope seed=0,1,2
  python train.py experiment=grid            a sweep that a config describes
  python train.py -m name=mine attn=mha,mqa match=params hydra/launcher=submitit_slurm
  python train.py out=outputs/runs/mine resume=true
"""


def door(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command; bad input becomes one line on stderr and exit code 2.

    HEAD_TO_HEAD_TRACEBACK=1 shows where it was found.
    """
    try:
        return main(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("HEAD_TO_HEAD_TRACEBACK"):
            raise
        from train.progress import printable

        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@dataclass(frozen=True)
class Tools:
    """What `python train.py` calls beyond training, with the names and configs of runs."""

    plan: Callable[[list[tuple[str, Config]]], int]  # plan=true: what they would cost
    forecast: Callable[[list[tuple[str, Config]], int], None]  # what a sweep is about to do
    report: Callable[[Path], str]  # writes a sweep's report into its folder; its verdict


def train(arguments: list[str], tools: Tools) -> int:
    """`python train.py`: exit code 0 done, 1 a sweep with failed runs, 3 stopped, 128+ on a signal."""
    if {"-h", "--help"} & set(arguments):
        print(help_page(USAGE, "train"))
        return 0
    flags = {a for a in arguments if a in ("-m", "--multirun")}
    elsewhere = [a for a in arguments if a.lstrip("+").startswith("hydra")]
    overrides = [a for a in arguments if a not in flags and a not in elsewhere]
    cells = sweeps.cells_of(overrides, multirun=bool(flags))
    first = compose_matched(cells[0])
    if not fits(first["plan"], bool):
        raise ValueError(f"plan={first['plan']} is not true or false")
    settings = sweeps.settings_of(first)
    if first["plan"]:
        runs = [stage for cell in cells for stage in sweeps.stages_of(cell, first)]
        configs = [compose_matched(cell) for cell in runs]
        return tools.plan(list(zip(sweeps.cell_names(runs), configs, strict=True)))
    if flags or len(cells) > 1 or first["stages"] is not None:
        return sweeps.sweep(cells, settings, elsewhere, tools.forecast, tools.report)
    if elsewhere:
        raise ValueError(f"{elsewhere[0]}: a launcher is for sweeps (-m)")
    return run(first)


def compose_door(overrides: list[str], name: str, usage: str) -> Config | None:
    """The config of a command; None after showing its help, if that was asked for."""
    if {"-h", "--help"} & set(overrides):
        print(help_page(usage, name))
        return None
    return compose(overrides, door=name)


def run(config: Config) -> int:
    """Train one config."""
    from train.launch import launch  # torch takes a second to import; --help and typos need none
    from train.launcher import end_with_the_sweep

    end_with_the_sweep()
    return launch(config)


def help_page(usage: str, config: str) -> str:
    """A command's usage, its groups with their choices, and its keys with their comments."""
    text = (CONFIGS / f"{config}.yaml").read_text()
    groups = re.findall(r"^  - (?:optional )?([a-z]+): (\w+)", text, re.MULTILINE)
    lines = [usage]
    if groups:
        lines.append(
            "Groups (GROUP=CHOICE; '*' is the default; each choice is configs/GROUP/CHOICE.yaml)"
        )
        for group, default in groups:
            names = [f"*{c}" if c == default else c for c in choices_of(group)]
            lines.append(f"  {group:<11} {'  '.join(names)}")
        lines.append("")
        for group in (group for group, _ in groups if group != "experiment"):
            keys = {k for c in choices_of(group) for k in keys_of(CONFIGS / group / f"{c}.yaml")}
            lines.append(f"  {group}.*  {' '.join(sorted(keys))}")
        lines.append("")
    lines.append("Keys (KEY=VALUE; numbers may be written 1e3)")
    lines.append("\n".join(f"  {line}" for line in text.split("\n\n", 1)[1].splitlines()))
    lines.append(
        "\nExit codes: 0 done, 1 a sweep with failed runs, 2 bad input, 3 stopped on purpose,"
    )
    lines.append(
        "130/143 interrupted and saved. HEAD_TO_HEAD_TRACEBACK=1 shows where an error came from."
    )
    return "\n".join(lines)
