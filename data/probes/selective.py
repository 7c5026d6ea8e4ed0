"""Selective copying: the letters of a row, without what lies between."""

import random
from dataclasses import dataclass
from typing import ClassVar

from data.probes.base import AGAIN, FILLER, OfLetters, at_least_one, document


@dataclass(frozen=True, kw_only=True)
class Selective(OfLetters):
    """Letters at random places among `length` characters, then the letters alone: `.k..f.a|kfa`.

    A level is how many; the alphabet has `letters`. Selective copying as in Mamba (Gu and Dao 2023,
    https://arxiv.org/abs/2312.00752). Raises ValueError for letters that do not exist.
    """

    length: int

    UNIT: ClassVar[str] = "letters"

    def __post_init__(self) -> None:
        at_least_one(length=self.length)
        super().__post_init__()

    @property
    def most(self) -> int:
        return self.length

    def row(self, level: int, draw: random.Random) -> str:
        text = self.text(level, draw)
        shown = [FILLER] * self.length
        for place, letter in zip(sorted(draw.sample(range(self.length), level)), text, strict=True):
            shown[place] = letter
        return document([("".join(shown) + AGAIN, text, self.group(level))])
