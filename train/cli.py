"""What the command line asks for: one run, or a sweep of them, or help."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from train.config import CONFIGS, Config, choices_of, compose, expand, fits, keys_of, parse, quoted

USAGE = """\
Train a small decoder-only language model with the attention and the positions of your choice,
and record what it cost and what it bought.

  python train.py [KEY=VALUE ...]            one run
  python train.py -m KEY=A,B,C [...]         a sweep: every combination, each in its own process
  python train.py plan=true [...]            what one run, or with -m a sweep, would cost

Examples
  python train.py attn=gqa pos=rope
  python train.py attn=gqa attn.n_kv_heads=1 data=text data.path="my/*.txt" steps=1e3
  python train.py -m name=grid attn=mha,gqa,mqa pos=learned,rope seed=0,1,2
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
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train(arguments: list[str], plan: Callable[[list[tuple[str, Config]]], int]) -> int:
    """`python train.py`: exit code 0 done, 1 a sweep with failed runs, 3 stopped, 128+ on a signal.

    `plan` is what plan=true calls instead, with the names and configs of all runs.
    """
    if {"-h", "--help"} & set(arguments):
        print(help_page(USAGE, "train"))
        return 0
    multirun = [a for a in arguments if a in ("-m", "--multirun")]
    overrides = [a for a in arguments if a not in multirun]
    cells = cells_of(overrides, multirun=bool(multirun))
    configs = [compose(cell) for cell in cells]
    for config in configs:
        if not fits(config["plan"], bool):
            raise ValueError(f"plan={config['plan']} is not true or false")
    if any(config["plan"] for config in configs):
        return plan(list(zip(cell_names(cells), configs, strict=True)))
    return sweep(cells, configs) if multirun or len(cells) > 1 else run(configs[0])


def cells_of(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """The overrides of every run that a command line asks for, each once.

    They are the combinations of the values listed, times those of each line of the config's `sweep`
    key; what the command line itself sets wins over such a line.
    """
    cells = []
    for cell in expand(overrides) if multirun else [overrides]:
        own = {override.get_key_element().lstrip("+") for override in parse(cell)}
        named = {"experiment", "sweep"} & own  # nothing else sets it, and composing takes 0.1 s
        lines = compose(cell)["sweep"] if named else None
        if lines is None:
            cells.append(cell)
            continue
        if not fits(lines, list[str]) or not lines:
            raise ValueError(f"sweep={lines} is not a list of texts, each a line of overrides")
        for line in lines:
            for more in expand(shlex.split(line)):
                kept = [o for o in more if not {key := o.partition("=")[0], group_of(key)} & own]
                cells.append([*kept, *cell, "sweep=null"])
    return list(map(list, dict.fromkeys(map(tuple, cells))))


def compose_door(overrides: list[str], name: str, usage: str) -> Config | None:
    """The config of a command; None after showing its help, if that was asked for."""
    if {"-h", "--help"} & set(overrides):
        print(help_page(usage, name))
        return None
    return compose(overrides, door=name)


def run(config: Config) -> int:
    """Train one config."""
    from train.launch import launch  # torch takes a second to import; --help and typos need none

    return launch(config)


def group_of(key: str) -> str:
    """attn of attn.n_kv_heads and of attn@attn.global."""
    return re.split("[.@]", key)[0]


def sweep(cells: list[list[str]], configs: list[Config]) -> int:
    """Train every cell, one process after the other, and show them side by side.

    All are checked before any starts. Started again under the same name, it skips what is done and
    resumes what was interrupted.
    """
    from train.job import check
    from train.launch import load_summary
    from train.progress import by_step, number, say, side_by_side

    for config in configs:
        check(config)
    title = configs[0]["name"] or time.strftime("%Y%m%d-%H%M%S")
    parent = Path(configs[0]["out"] or Path("outputs/sweeps") / title)
    folders = [parent / name for name in cell_names(cells)]
    failed = 0
    for i, (cell, folder) in enumerate(zip(cells, folders, strict=True)):
        say(f"run {i + 1}/{len(cells)}: {shlex.join(cell)}")
        command = [sys.executable, sys.argv[0], *cell, f"out={quoted(str(folder))}", "resume=true"]
        code = wait(command)
        failed += code != 0
        if code != 0:
            say(f"run {i + 1}/{len(cells)} failed with exit code {code}")
    print(side_by_side([(f.name, load_summary(f)) for f in folders]))
    if parents := sorted({c["init_from"] for c in configs if c["init_from"]}):
        print("\nvalidation loss by step\n" + by_step([(f.name, validations(f)) for f in folders]))
        for run in parents:
            before = (load_summary(Path(run)) or {}).get("val_loss")
            print(f"of {run}: {number(before, '.4f')}")
    print(f"sweep: {parent}  ({len(cells)} runs, {failed} failed)")
    return 1 if failed else 0


def validations(folder: Path) -> dict[int, float]:
    """The validation loss of a run at each step that has one."""
    from train.record import records

    path = folder / "metrics.jsonl"
    found = records(path) if path.exists() else iter(())
    return {r["step"]: r["loss"] for r in found if r["split"] == "val"}


def wait(command: list[str]) -> int:
    """Run a command to its end. A SIGINT reaches it too: it saves, and then the sweep ends."""
    process = subprocess.Popen(command)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    return code if code >= 0 else 128 - code


def cell_names(cells: list[list[str]]) -> list[str]:
    """Folder names that tell what differs between the cells of a sweep: '003_attn-gqa_seed-1'."""
    shared = set.intersection(*map(set, cells))
    names = []
    for number, cell in enumerate(cells):
        words = [re.sub(r"[^\w.]+", "-", o) for o in cell if o not in shared]
        names.append("_".join([f"{number:03d}", *words])[:120])
    return names


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
