"""Copy: the same text again."""

import random
from dataclasses import dataclass
from typing import ClassVar

from data.probes.base import AGAIN, OfLetters, document


@dataclass(frozen=True, kw_only=True)
class Copy(OfLetters):
    """Random letters, then the same again: `kfa|kfa`.

    A level is how many; the alphabet has `letters`. Training on short texts and asking for longer
    ones is the usual test of length generalisation (Kazemnejad et al. 2023,
    https://arxiv.org/abs/2305.19466). Raises ValueError for letters that do not exist.
    """

    UNIT: ClassVar[str] = "letters"
    most: ClassVar[int] = 1 << 16

    def row(self, level: int, draw: random.Random) -> str:
        text = self.text(level, draw)
        return document([(text + AGAIN, text, self.group(level))])
