"""What was tried: a line of JSON for each candidate and each word on it, the last of which counts."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from compare.statistics.online import Noise, level_of, pooled

OPEN = "undecided"


@dataclass(frozen=True)
class Entry:
    """One candidate: its place in the order, its level, and what is known of it."""

    number: int  # from 1, in the order of the first call
    base: str  # identities of the variants
    new: str
    level: float  # at which it may be kept, fixed when it is first asked for
    verdict: str = OPEN
    differences: list[float] = field(default_factory=list)  # in scores, by seed
    answer: dict[str, Any] = field(default_factory=dict)  # as printed


class Ledger:
    """The candidates of a folder, in their order."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ledger.jsonl"
        self.entries: dict[int, Entry] = {}
        lines = self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else [""]
        for at, line in enumerate(lines[:-1], 1):  # what follows the last line break was cut off
            entry = opened(line, f"{self.path}, line {at}")
            self.entries[entry.number] = entry
        if lines[-1]:
            os.truncate(self.path, self.path.stat().st_size - len(lines[-1].encode()))

    def entry(self, base: str, new: str) -> Entry:
        """A candidate's entry; a new one, with the next number and level, where there is none."""
        for entry in self.entries.values():
            if (entry.base, entry.new) == (base, new):
                return entry
        number = len(self.entries) + 1
        kept = [entry.number for entry in self.entries.values() if entry.verdict == "keep"]
        return self.write(Entry(number, base, new, level_of(number, kept)))

    def noise(self, entry: Entry) -> Noise | None:
        """That of the other comparisons with the same base, among them the one that made it the base."""
        return pooled(
            [
                other.differences
                for other in self.entries.values()
                if entry.base in (other.base, other.new) and other.number != entry.number
            ]
        )

    def conclude(
        self, entry: Entry, verdict: str, differences: Sequence[float], answer: dict[str, Any]
    ) -> None:
        """Write down a word on a candidate."""
        self.write(replace(entry, verdict=verdict, differences=list(differences), answer=answer))

    def write(self, entry: Entry) -> Entry:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(entry)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.entries[entry.number] = entry
        return entry


def opened(line: str, where: str) -> Entry:
    """The entry in a line. Raises ValueError for anything else."""
    try:
        return Entry(**json.loads(line))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {line[:40]!r} is not an entry of a ledger") from error
