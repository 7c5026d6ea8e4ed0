"""Recall: which value stood beside this key?"""

import random
from dataclasses import dataclass
from typing import ClassVar

from data.probes.base import FILLER, Task, document, letters

GROUPS = ("pairs", "distance")
BIN = 8  # characters of distance that are one group


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Pairs of a key and a value, then as many keys again, at random places, each for its value.

    Multi-query associative recall (Arora et al. 2023, https://arxiv.org/abs/2312.04927), with the
    answer behind each key that is asked, too: `aXbY....bY..bY..`. Which key is asked is drawn anew each
    time: if each came once, the values not yet shown would tell the answer to who does not look up any.
    Keys are small letters, `keys` of them, and values capital ones. A row has `length` characters; a
    level is its number of pairs. Accuracy is by the pairs of a row, or with `by=distance` by the
    characters since the same key was last seen. Raises ValueError for letters that do not exist and for
    another `by`.
    """

    VERSION: ClassVar[int] = 2

    length: int
    keys: int
    values: int
    by: str

    UNIT: ClassVar[str] = "pairs"

    def __post_init__(self) -> None:
        letters(self.keys, "keys"), letters(self.values, "values")
        if self.by not in GROUPS:
            raise ValueError(f"data.by={self.by} is not one of {', '.join(GROUPS)}")
        super().__post_init__()

    @property
    def most(self) -> int:
        return min(self.length // 4, self.keys)

    def row(self, level: int, draw: random.Random) -> str:
        keys = draw.sample(letters(self.keys, "keys"), level)
        values = draw.choices(letters(self.values, "values", capital=True), k=level)
        free = range(level, self.length // 2)  # places of two characters, after the pairs
        places = draw.sample(free, level)
        asked = dict(zip(places, draw.choices(range(level), k=level), strict=True))
        seen = list(range(level))  # the last place of each key
        text = "".join(key + value for key, value in zip(keys, values, strict=True))
        parts = []
        for place in free:
            if place not in asked:
                text += 2 * FILLER
                continue
            pair = asked[place]
            distance = 2 * (place - seen[pair])
            parts.append((text + keys[pair], values[pair], self.name(level, distance)))
            text, seen[pair] = "", place
        return document(parts, text)

    def name(self, level: int, distance: int) -> str:
        """The group of an answer."""
        if self.by == "pairs":
            return self.group(level)
        first = distance // BIN * BIN
        return f"{first}-{first + BIN - 1} characters back"
