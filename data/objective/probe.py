"""Answers within a text: of a row, what was asked for is learned and nothing else.

Shapes: B rows, T tokens of context, N rows of the validation split.
"""

from dataclasses import dataclass
from typing import Any

from data.corpus import Corpus
from data.objective.asked import Asked
from data.objective.base import IGNORED, Batch, as_batch

PADDING = 0  # any token: nothing before it sees it


@dataclass(frozen=True)
class Answer:
    """Where an answer stands in a row, and the group that accuracy is reported for, as token ids."""

    start: int
    end: int
    group: list[int]

    @property
    def place(self) -> slice:
        return slice(self.start, self.end)


@dataclass(frozen=True)
class Row:
    """A text as token ids, and the answers in it."""

    tokens: list[int]
    answers: list[Answer]

    @property
    def groups(self) -> set[tuple[int, ...]]:
        """The groups of its answers."""
        return {tuple(answer.group) for answer in self.answers}


class Probe(Asked[Row]):
    """Rows of text with answers in them, padded to the context; loss on the answers alone.

    A document is text, an answer that follows it and the answer's group, with a tab after each,
    as often as wanted; then the rest of the text. A model sees text and answers, without tabs.
    Validation gives the nats of each answer's tokens in the validation rows with a group that training
    has too, if there are any: elsewhere a loss says most about how sure a wrong answer is.
    Raises ValueError for a document of another form, and for one that does not fit into the context.
    """

    def __init__(self, corpus: Corpus, **order: Any) -> None:
        super().__init__(corpus, **order)
        known = {group for row in self.train for group in row.groups}
        self.known = [row for row in self.val if row.groups & known]

    def train_answers(self) -> list[list[int]]:
        return [row.tokens[answer.place] for row in self.train for answer in row.answers]

    def batch(self, rows: list[Row]) -> Batch:
        inputs, targets = as_batch([row.tokens for row in rows], self.length, PADDING)
        for learned, row in zip(targets, rows, strict=True):
            before = 1  # the first token is never a target
            for answer in row.answers:
                learned[before - 1 : answer.start - 1] = IGNORED
                before = answer.end
            learned[before - 1 :] = IGNORED
        return inputs, targets

    @property
    def scored(self) -> list[Row]:
        return self.known or self.val

    @property
    def prompt(self) -> list[int]:
        """A row up to its first answer."""
        row = (self.val or self.train)[0]
        return row.tokens[: row.answers[0].start]

    def read_one(self, cells: list[list[int]], where: str) -> Row:
        tokens: list[int] = []
        answers = []
        for text, answer, group in zip(cells[:-1:3], cells[1::3], cells[2::3], strict=False):
            tokens += text
            start = len(tokens)
            tokens += answer
            answers.append(Answer(start, len(tokens), group))
        tokens += cells[-1]
        where = f"objective=probe: row {where}"
        if len(cells) % 3 != 1 or not answers or any(a.start in (0, a.end) for a in answers):
            raise ValueError(
                f"{where}, {self.text_of(cells)!r}, is not TEXT<tab>ANSWER<tab>GROUP<tab>, as often as wanted, and "
                "the rest of the text"
            )
        if len(tokens) > self.length + 1:
            raise ValueError(
                f"{where} needs model.max_len={len(tokens) - 1}, and there are {self.length}"
            )
        return Row(tokens, answers)
