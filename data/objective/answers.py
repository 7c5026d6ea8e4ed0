"""Answers to questions: what comes after a question, and nothing else, is learned.

Shapes: B rows, T tokens of context, N questions of the validation split.
"""

from dataclasses import dataclass
from typing import Any

from data import tokenizer as tokenizers
from data.corpus import Corpus
from data.objective.base import IGNORED, Batch, Documents, Draws, Objective, as_batch


@dataclass(frozen=True)
class Question:
    """A question with its answer, and the group that accuracy is reported for, as token ids."""

    question: list[int]
    answer: list[int]
    group: list[int]
    mark: int

    @property
    def prompt(self) -> list[int]:
        """The question and the mark that the answer follows."""
        return [*self.question, self.mark]

    @property
    def row(self) -> list[int]:
        return [*self.prompt, *self.answer, self.mark]


class Answers(Objective):
    """Rows `question MARK answer MARK`, padded to the context; loss on all after the question.

    A document is a question and an answer with a tab between them, and if wanted a second tab and a
    group. An answer that begins with a space has the tokens that its words have within a sentence.
    As in the finetuning of the CS224n assignment on pretraining, the first mark is learned
    too. Validation gives the nats of each such token of the validation questions.
    Raises ValueError for a document without a tab, and for one that does not fit into the context.
    """

    marks = partial = True

    def __init__(self, corpus: Corpus, **order: Any) -> None:
        super().__init__(corpus, **order)
        self.tab = tokenizers.encode(corpus.tokenizer, "\t")
        self.train = self.read("train")
        self.val = [] if corpus.val is None else self.read("val")
        self.draws = Draws(self, len(self.train))

    def __call__(self, step: int) -> Batch:
        return self.batch([self.train[int(number)] for number in self.draws(step)])

    def train_answers(self) -> list[list[int]]:
        """The answers of training."""
        return [question.answer for question in self.train]

    def batch(self, questions: list[Question]) -> Batch:
        """Inputs and targets (B, T) of questions."""
        inputs, targets = as_batch([q.row for q in questions], self.length, self.mark)
        for row, question in zip(targets, questions, strict=True):
            row[: len(question.question) - 1] = IGNORED
        return inputs, targets

    @property
    def validation_rows(self) -> Batch | None:
        return self.batch(self.val) if self.val else None

    @property
    def validation_tokens(self) -> int:
        return len(self.val) * self.length

    @property
    def validation_bytes(self) -> None:
        return None

    @property
    def prompt(self) -> list[int]:
        """A question of the validation split."""
        return (self.val or self.train)[0].prompt

    def read(self, split: str) -> list[Question]:
        """The questions of a split."""
        documents = Documents(self.corpus, split)
        return [self.read_one(documents[n], n, split) for n in range(len(documents))]

    def read_one(self, document: list[int], number: int, split: str) -> Question:
        """A document as a question. Raises ValueError if it is none, or does not fit."""
        parts: list[list[int]] = [[]]
        for token in document:
            if [token] == self.tab:
                parts.append([])
            else:
                parts[-1].append(token)
        text = tokenizers.decode(self.corpus.tokenizer, document)
        where = f"objective=answers: question {number + 1} of {split}, {text!r}"
        if not 2 <= len(parts) <= 3 or not parts[0] or not parts[1]:
            raise ValueError(
                f"{where}, is not QUESTION<tab>ANSWER or QUESTION<tab>ANSWER<tab>GROUP"
            )
        question = Question(parts[0], parts[1], parts[2] if len(parts) == 3 else [], self.mark)
        if len(question.row) > self.length + 1:
            raise ValueError(
                f"{where}, needs model.max_len={len(question.row) - 1}, and there are {self.length}"
            )
        return question
