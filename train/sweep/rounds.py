"""Seeds in rounds: `seeds=auto` trains more seeds of a variant until its question is answered."""

from collections.abc import Collection, Sequence

from train.config.keys import origin_of
from train.sweep.plan import Cell, identity


def asked(planned: Sequence[Cell], seeds: int, going: Collection[str] | None) -> list[Cell]:
    """The runs of a round of so many seeds: of the variants whose runs are `going` on, None for all.

    With the stages before them.
    """
    wanted = None if going is None else {group(cell) for cell in planned if cell.name in going}
    names = {
        cell.name
        for cell in planned
        if cell.config["seed"] < seeds and (wanted is None or group(cell) in wanted)
    }
    by_name = {cell.name: cell for cell in planned}
    for name in list(names):
        while before := by_name[name].parent:
            names.add(name := before)
    return [cell for cell in planned if cell.name in names]


def group(cell: Cell) -> str:
    """What a run has in common with those of other seeds."""
    origin = "the stage before" if cell.parent else origin_of(cell.config)
    return identity(cell.config | {"seed": 0}, origin)
