"""Induction: what followed this sign the last time?"""

import random
from dataclasses import dataclass
from typing import ClassVar

from data.probes.base import OfLetters, at_least_one, document

SIGN = "!"


@dataclass(frozen=True, kw_only=True)
class Induction(OfLetters):
    """Random letters with a sign among them, which comes again at the end: `kf!ahc!a`.

    A level is the characters from the first sign to the second; a row has `length` before the second.
    The alphabet has `letters`. The induction heads of Olsson et al. 2022
    (https://arxiv.org/abs/2209.11895), as a task in H3 (Fu et al. 2022,
    https://arxiv.org/abs/2212.14052). Raises ValueError for letters that do not exist.
    """

    length: int

    UNIT: ClassVar[str] = "characters back"
    LEAST: ClassVar[int] = 2

    def __post_init__(self) -> None:
        at_least_one(length=self.length)
        super().__post_init__()

    @property
    def most(self) -> int:
        return self.length

    def row(self, level: int, draw: random.Random) -> str:
        text = [*self.text(self.length, draw)]
        first = self.length - level
        text[first] = SIGN
        return document([("".join(text) + SIGN, text[first + 1], self.group(level))])
