"""Hops: where does a chain of pairs lead?"""

import random
from dataclasses import dataclass
from typing import ClassVar

from data.probes.base import OfLetters, document, letters

ASKED = "|"
ASKS = 4  # nodes for each that is asked about


@dataclass(frozen=True, kw_only=True)
class Hops(OfLetters):
    """A ring of letters as pairs in random order, then for some letters the one so many hops on.

    `bc de ab cd ea`, without the spaces, leads from a to b with 1 hop, and to c with 2, which is asked
    as `2ac`. A level is the number of hops, at most half the ring: beyond, the way back is shorter. A ring
    has `nodes`, of an alphabet of `letters`; one in four is asked about, since if all were, the letters
    not yet told would give answers away. With a prime number of nodes no answer is the way back of
    another. After Depo (Allen-Zhu 2025, https://arxiv.org/abs/2512.17351). Raises ValueError for letters
    that do not exist, and for a ring of fewer than two or of more than there are letters.
    """

    nodes: int

    VERSION: ClassVar[int] = 2
    UNIT: ClassVar[str] = "hops"

    def __post_init__(self) -> None:
        if not 2 <= self.nodes <= self.letters:
            raise ValueError(
                f"data.nodes={self.nodes} must be at least 2 and at most letters={self.letters}"
            )
        super().__post_init__()

    @property
    def most(self) -> int:
        return min(self.nodes // 2, 9)  # one digit

    def row(self, level: int, draw: random.Random) -> str:
        ring = draw.sample(letters(self.letters, "letters"), self.nodes)
        pairs = [here + there for here, there in zip(ring, ring[1:] + ring[:1], strict=True)]
        draw.shuffle(pairs)
        text = "".join(pairs) + ASKED
        parts = []
        for start in draw.sample(range(self.nodes), max(1, self.nodes // ASKS)):
            end = ring[(start + level) % self.nodes]
            parts.append((f"{text}{level}{ring[start]}", end, self.group(level)))
            text = ""
        return document(parts)
