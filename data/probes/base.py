"""What all probes share: rows from a seed, in training and validation, as hard as asked for."""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from typing import ClassVar

FILLER = "."  # a character that says nothing
AGAIN = "|"  # what is to be copied ends here


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """Rows of a task, a pure function of its keys; nothing is downloaded.

    Training has `rows` documents, each of a level that is drawn from `levels`; validation has
    `val_rows` of each of `val_levels`. `seed` is that of the rows, not of the run. Raises ValueError
    for levels that the task does not have.
    """

    levels: list[int]
    val_levels: list[int]
    rows: int
    val_rows: int
    seed: int

    #: Changes whenever the rows of the same keys do.
    VERSION: ClassVar[int] = 1
    #: What a level counts, in the plural.
    UNIT: ClassVar[str]
    #: The easiest level.
    LEAST: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for key in ("levels", "val_levels"):
            asked = getattr(self, key)
            if not asked or min(asked) < self.LEAST or max(asked) > self.most:
                raise ValueError(
                    f"data.{key}={asked} must be numbers of {self.UNIT} from {self.LEAST} to "
                    f"{self.most}, the most that data's other keys allow"
                )
        if min(self.rows, self.val_rows) < 1 or self.seed < 0:
            raise ValueError(
                f"data.rows={self.rows} and data.val_rows={self.val_rows} must be at least 1, "
                f"data.seed={self.seed} at least 0"
            )

    @property
    @abstractmethod
    def most(self) -> int:
        """The hardest level that the other keys allow."""

    @abstractmethod
    def row(self, level: int, draw: random.Random) -> str:
        """A document of this level, as `document` writes it."""

    def key(self) -> str:
        return f"{type(self).__name__}:{self.VERSION}:{asdict(self)}"

    def load(self) -> dict[str, list[str]]:
        train, val = (random.Random(f"{split} {self.seed}") for split in ("train", "val"))
        return {
            "train": [self.row(train.choice(self.levels), train) for _ in range(self.rows)],
            "val": [self.row(n, val) for n in self.val_levels for _ in range(self.val_rows)],
        }

    def group(self, level: int) -> str:
        """The name of a level in reports, as '4 pairs'."""
        one = level == 1 and " " not in self.UNIT
        return f"{level} {self.UNIT.removesuffix('s') if one else self.UNIT}"


@dataclass(frozen=True, kw_only=True)
class OfLetters(Task):
    """A task whose rows are of the first `letters` small letters. Raises ValueError if there are none."""

    letters: int

    def __post_init__(self) -> None:
        letters(self.letters, "letters")
        super().__post_init__()

    def text(self, count: int, draw: random.Random) -> str:
        """So many letters, each drawn anew."""
        return "".join(draw.choices(letters(self.letters, "letters"), k=count))


def document(parts: Iterable[tuple[str, str, str]], rest: str = "") -> str:
    """A document of texts, each with the answer that follows it and the group of that, and of what is
    shown after the last; see `data.objective.probe.Probe`."""
    return "\t".join([*(cell for part in parts for cell in part), rest])


def at_least_one(**keys: int) -> None:
    """Raise ValueError for keys of `data` below 1."""
    for key, value in keys.items():
        if value < 1:
            raise ValueError(f"data.{key}={value} must be at least 1")


@cache
def letters(count: int, key: str, *, capital: bool = False) -> str:
    """The first so many small or capital letters of Unicode: a to z, then those of other alphabets.

    Raises ValueError, naming the key, for none and for more than there are.
    """
    at_least_one(**{key: count})
    every = (chr(point) for point in range(0x110000))
    found = [c for c in every if (c.isupper() if capital else c.islower())][:count]
    if len(found) < count:
        raise ValueError(f"data.{key}={count} must be at most {len(found)}")
    return "".join(found)
