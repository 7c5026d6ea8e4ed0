"""Answers to questions: what comes after a question, and nothing else, is learned.

Shapes: B rows, T tokens of context, N questions of the validation split.
"""

from dataclasses import dataclass

from data.objective.asked import Asked
from data.objective.base import IGNORED, Batch, as_batch


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


class Answers(Asked[Question]):
    """Rows `question MARK answer MARK`, padded to the context; loss on all after the question.

    A document is a question and an answer with a tab between them, and if wanted a second tab and a
    group. An answer that begins with a space has the tokens that its words have within a sentence.
    As in the finetuning of the CS224n assignment on pretraining, the first mark is learned
    too. Validation gives the nats of each such token of the validation questions.
    Raises ValueError for a document without a tab, and for one that does not fit into the context.
    """

    marks = True

    def train_answers(self) -> list[list[int]]:
        return [question.answer for question in self.train]

    def batch(self, rows: list[Question]) -> Batch:
        inputs, targets = as_batch([question.row for question in rows], self.length, self.mark)
        for learned, question in zip(targets, rows, strict=True):
            learned[: len(question.question) - 1] = IGNORED
        return inputs, targets

    @property
    def prompt(self) -> list[int]:
        """A question of the validation split."""
        return (self.val or self.train)[0].prompt

    def read_one(self, cells: list[list[int]], where: str) -> Question:
        if not 2 <= len(cells) <= 3 or not cells[0] or not cells[1]:
            raise ValueError(
                f"objective=answers: question {where}, {self.text_of(cells)!r}, is not "
                "QUESTION<tab>ANSWER or QUESTION<tab>ANSWER<tab>GROUP"
            )
        question = Question(cells[0], cells[1], cells[2] if len(cells) == 3 else [], self.mark)
        if len(question.row) > self.length + 1:
            raise ValueError(
                f"objective=answers: question {where}, {self.text_of(cells)!r}, needs "
                f"model.max_len={len(question.row) - 1}, and there are {self.length}"
            )
        return question
