"""Answers within a text: of a row, what was asked for is learned and nothing else.

Shapes: B rows, T tokens of context, N rows of the validation split.
"""

from dataclasses import dataclass
from typing import Any

from data import tokenizer as tokenizers
from data.corpus import Corpus
from data.objective.base import IGNORED, Batch, Documents, Draws, Objective, as_batch

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


class Probe(Objective):
    """Rows of text with answers in them, padded to the context; loss on the answers alone.

    A document is text, an answer that follows it and the answer's group, with a tab after each,
    as often as wanted; then the rest of the text. A model sees text and answers, without tabs.
    Validation gives the nats of each answer's tokens in the validation rows with a group that training
    has too, if there are any: elsewhere a loss says most about how sure a wrong answer is.
    Raises ValueError for a document of another form, and for one that does not fit into the context.
    """

    partial = True

    def __init__(self, corpus: Corpus, **order: Any) -> None:
        super().__init__(corpus, **order)
        self.tab = tab_of(corpus)
        self.train = self.read("train")
        self.val = [] if corpus.val is None else self.read("val")
        self.draws = Draws(self, len(self.train))
        known = {group for row in self.train for group in row.groups}
        self.scored = [row for row in self.val if row.groups & known] or self.val

    def __call__(self, step: int) -> Batch:
        return self.batch([self.train[int(number)] for number in self.draws(step)])

    def train_answers(self) -> list[list[int]]:
        """The answers of training."""
        return [row.tokens[answer.place] for row in self.train for answer in row.answers]

    def batch(self, rows: list[Row]) -> Batch:
        """Inputs and targets (B, T) of rows."""
        inputs, targets = as_batch([row.tokens for row in rows], self.length, PADDING)
        for learned, row in zip(targets, rows, strict=True):
            before = 1  # the first token is never a target
            for answer in row.answers:
                learned[before - 1 : answer.start - 1] = IGNORED
                before = answer.end
            learned[before - 1 :] = IGNORED
        return inputs, targets

    @property
    def validation_rows(self) -> Batch | None:
        return self.batch(self.scored) if self.scored else None

    @property
    def validation_tokens(self) -> int:
        return len(self.scored) * self.length

    @property
    def validation_bytes(self) -> None:
        return None

    @property
    def prompt(self) -> list[int]:
        """A row up to its first answer."""
        row = (self.val or self.train)[0]
        return row.tokens[: row.answers[0].start]

    def read(self, split: str) -> list[Row]:
        """The rows of a split."""
        documents = Documents(self.corpus, split)
        return [self.read_one(documents[n], n, split) for n in range(len(documents))]

    def read_one(self, document: list[int], number: int, split: str) -> Row:
        """A document as a row. Raises ValueError if it is none, or does not fit."""
        parts: list[list[int]] = [[]]
        for token in document:
            if [token] == self.tab:
                parts.append([])
            else:
                parts[-1].append(token)
        tokens: list[int] = []
        answers = []
        for text, answer, group in zip(parts[:-1:3], parts[1::3], parts[2::3], strict=False):
            tokens += text
            start = len(tokens)
            tokens += answer
            answers.append(Answer(start, len(tokens), group))
        tokens += parts[-1]
        where = f"objective=probe: row {number + 1} of {split}"
        if len(parts) % 3 != 1 or not answers or any(a.start in (0, a.end) for a in answers):
            shown = tokenizers.decode(self.corpus.tokenizer, document)
            raise ValueError(
                f"{where}, {shown!r}, is not TEXT<tab>ANSWER<tab>GROUP<tab>, as often as wanted, and "
                "the rest of the text"
            )
        if len(tokens) > self.length + 1:
            raise ValueError(
                f"{where} needs model.max_len={len(tokens) - 1}, and there are {self.length}"
            )
        return Row(tokens, answers)


def tab_of(corpus: Corpus) -> list[int]:
    """The tab as token ids; none if the text of a corpus, and so its vocabulary, has no tab."""
    try:
        return tokenizers.encode(corpus.tokenizer, "\t")
    except ValueError:
        return []
