"""Addition: the sum of two numbers, digit by digit."""

import random
from dataclasses import dataclass
from typing import ClassVar

from data.probes.base import Task, at_least_one, document

BASE = 10


@dataclass(frozen=True, kw_only=True)
class Add(Task):
    """Sums of two numbers: `37+85=122 `, or with `reversed` the last digit first: `73+58=221 `.

    A level is the digits of a number; a sum has one more, and all have leading zeros. A row has
    `sums`. Reversed sums are learned with far less data (Lee et al. 2023,
    https://arxiv.org/abs/2307.03381). Raises ValueError for less than one.
    """

    sums: int
    reversed: bool

    UNIT: ClassVar[str] = "digits"
    most: ClassVar[int] = 1000

    def __post_init__(self) -> None:
        at_least_one(sums=self.sums)
        super().__post_init__()

    def row(self, level: int, draw: random.Random) -> str:
        parts: list[tuple[str, str, str]] = []
        for _ in range(self.sums):
            one, other = (draw.randrange(BASE**level) for _ in range(2))
            a, b = self.written(one, level), self.written(other, level)
            end = self.written(one + other, level + 1)
            parts.append((f"{' ' if parts else ''}{a}+{b}=", end, self.group(level)))
        return document(parts)

    def written(self, number: int, digits: int) -> str:
        """A number with so many digits."""
        text = f"{number:0{digits}}"
        return text[::-1] if self.reversed else text
