"""A small real set of labels: the names of Unicode characters and what kind of character each is."""

import random
import unicodedata

KINDS = {
    "L": "letter",
    "M": "mark",
    "N": "number",
    "P": "punctuation",
    "S": "symbol",
    "Z": "separator",
}
NUMBERED = ("CJK ", "HANGUL SYLLABLE", "TANGUT", "NUSHU", "KHITAN")  # names by number or by rule


class Characters:
    """Names of characters and their kind, as `GREEK SMALL LETTER ALPHA` and `letter`, from Python itself.

    A document is a name and a kind with a tab between, for objective=answers. `held_back` of them, drawn
    by `seed`, are for validation. Raises ValueError unless some remain for training.
    """

    def __init__(self, *, held_back: int, seed: int) -> None:
        self.held_back, self.seed = held_back, seed
        if not 1 <= held_back <= 10_000 or seed < 0:
            raise ValueError(
                f"data.held_back={held_back} must be at least 1 and at most 10000, and "
                f"data.seed={seed} at least 0"
            )

    def key(self) -> str:
        return f"characters:1:{unicodedata.unidata_version}:{self.held_back}:{self.seed}"

    def load(self) -> dict[str, list[str]]:
        labelled = []
        for point in range(0x110000):
            name = unicodedata.name(chr(point), "")
            kind = KINDS.get(unicodedata.category(chr(point))[0])
            if name and kind and not name.startswith(NUMBERED):
                labelled.append(f"{name}\t {kind}")
        random.Random(self.seed).shuffle(labelled)
        return {"train": labelled[self.held_back :], "val": labelled[: self.held_back]}
