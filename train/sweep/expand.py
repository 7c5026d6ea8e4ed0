"""The runs that a command line asks for, as overrides: combinations, lines of a config, stages."""

import re
import shlex
from collections.abc import Sequence

from train.config.compose import compose, expand, group_of, keys_set
from train.config.old_spellings import current_overrides
from train.config.options import SweepOptions
from train.config.schema import Config, arguments, fits
from train.setup.match import with_baseline

ROUNDS = (3, 5, 8, 12)  # seeds after which one looks; the statistics have a limit for each


def cells_of(overrides: list[str], *, multirun: bool) -> list[list[str]]:
    """The overrides of every run that a command line asks for, each once; stages not yet told apart.

    They are the combinations of the values listed, times those of each line of the config's `sweep`
    key; what the command line itself sets wins over such a line, and so does seeds=auto over its seed.
    """
    cells = []
    for cell in expand(overrides) if multirun else [overrides]:
        cell = current_overrides("train", cell)
        own = keys_set(cell)
        named = {"experiment", "sweep"} & own  # nothing else sets it, and composing takes 0.1 s
        config = compose(cell) if named else {"sweep": None}
        if config["sweep"] is None:
            cells.append(cell)
            continue
        replaced = own | {"seed"} if config["seeds"] == "auto" else own
        for line in lines_of(config, "sweep"):
            for more in expand(shlex.split(line)):
                wider = [*unless_set(more, replaced), *cell, "sweep=null"]
                cells.append(current_overrides("train", wider))
    if not cells:
        raise ValueError(f"{' '.join(overrides)}: no runs; a list of values is empty")
    unique = list(map(list, dict.fromkeys(map(tuple, cells))))
    return with_baseline(unique) if len(unique) > 1 else unique


def with_seeds(cells: Sequence[list[str]]) -> list[list[str]]:
    """Each cell with every seed that it may come to. Raises ValueError for one that has its own."""
    if named := next((cell for cell in cells if "seed" in keys_set(cell)), None):
        raise ValueError(f"seeds=auto chooses the seeds, but {' '.join(named)} has one")
    return [[*cell, f"seed={seed}", "seeds=null"] for cell in cells for seed in range(ROUNDS[-1])]


def lines_of(config: Config, key: str) -> list[str]:
    """A config's lines of overrides. Raises ValueError for anything else, or none."""
    lines = config[key]
    if not fits(lines, list[str]) or not lines:
        raise ValueError(f"{key}={lines} is not a list of texts, each a line of overrides")
    return lines


def unless_set(overrides: list[str], own: set[str]) -> list[str]:
    """The overrides that the command line does not replace.

    It replaces a key that it sets itself; and if it chooses a group that these choose too, their keys
    of that group.
    """
    chosen = own & {o.partition("=")[0] for o in overrides}
    return [o for o in overrides if not {key := o.partition("=")[0], group_of(key)} & chosen]


def stages_of(cell: list[str], config: Config) -> list[list[str]]:
    """The runs that one cell stands for: itself, or one for each line of the config's `stages`."""
    if config["stages"] is None:
        return [cell]
    own, lines = keys_set(cell), lines_of(config, "stages")
    first = compose(cell)["first_stage"] if "first_stage" in own else config["first_stage"]
    if not isinstance(first, int) or not 1 <= first <= len(lines):
        raise ValueError(f"first_stage={first} is not one of the {len(lines)} stages")
    return [
        current_overrides("train", [*unless_set(shlex.split(line), own), *cell, "stages=null"])
        for line in lines[first - 1 :]
    ]


def cell_names(cells: list[list[str]]) -> list[str]:
    """Folder names that tell what differs between the cells of a sweep: 'attn-gqa_seed-1'."""
    shared = set.intersection(*map(set, cells))
    names = []
    for cell in cells:
        words = [re.sub(r"[^\w.]+", "-", o) for o in cell if o not in shared]
        names.append("_".join(words)[:100] or "run")
    return names


def settings_of(config: Config) -> SweepOptions:
    """A config's keys of a sweep. Raises ValueError for what they cannot be."""
    keys = ("jobs", "retry", "seeds", "margin")
    return SweepOptions(**arguments("", {key: config[key] for key in keys}, SweepOptions)[0])
