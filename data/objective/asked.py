"""What objectives with answers share: a document is a row, of cells with tabs between.

Shapes: B rows, T tokens of context, N rows of the validation split.
"""

from abc import abstractmethod
from typing import Any, Generic, TypeVar

from data import tokenizer as tokenizers
from data.corpus import Corpus
from data.objective.base import Batch, Documents, Draws, Objective

Row = TypeVar("Row")


class Asked(Objective, Generic[Row]):
    """Rows of documents that ask for answers, read once; `batch` pads them and says what is learned.

    Raises ValueError for a document of another form, and for one that does not fit into the context.
    """

    partial = True

    def __init__(self, corpus: Corpus, **order: Any) -> None:
        super().__init__(corpus, **order)
        self.tab = tab_of(corpus)
        self.train = self.read("train")
        self.val = [] if corpus.val is None else self.read("val")
        self.draws = Draws(self, len(self.train))

    def __call__(self, step: int) -> Batch:
        return self.batch([self.train[int(number)] for number in self.draws(step)])

    @abstractmethod
    def batch(self, rows: list[Row]) -> Batch:
        """Inputs and targets (B, T) of rows."""

    @abstractmethod
    def train_answers(self) -> list[list[int]]:
        """The answers of training, as token ids."""

    @abstractmethod
    def read_one(self, cells: list[list[int]], where: str) -> Row:
        """The cells of a document as a row. Raises ValueError, saying `where`, if it is none, or does not
        fit."""

    def read(self, split: str) -> list[Row]:
        """The rows of a split."""
        documents = Documents(self.corpus, split)
        return [
            self.read_one(self.cells(documents[n]), f"{n + 1} of {split}")
            for n in range(len(documents))
        ]

    def cells(self, document: list[int]) -> list[list[int]]:
        """What stands between the tabs of a document."""
        found: list[list[int]] = [[]]
        for token in document:
            if token == self.tab:
                found.append([])
            else:
                found[-1].append(token)
        return found

    def text_of(self, cells: list[list[int]]) -> str:
        """A document, from its cells."""
        return "\t".join(tokenizers.decode(self.corpus.tokenizer, cell) for cell in cells)

    @property
    def scored(self) -> list[Row]:
        """The rows that validation scores."""
        return self.val

    @property
    def validation_rows(self) -> Batch | None:
        return self.batch(self.scored) if self.scored else None

    @property
    def validation_tokens(self) -> int:
        return len(self.scored) * self.length

    @property
    def validation_bytes(self) -> None:
        return None


def tab_of(corpus: Corpus) -> int | None:
    """The token of a tab; None if the text of a corpus, and so its vocabulary, has no tab."""
    try:
        (tab,) = tokenizers.encode(corpus.tokenizer, "\t")
    except ValueError:
        return None
    return tab
