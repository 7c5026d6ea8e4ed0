"""Objectives: what a model learns to predict, and what it is validated on.

Shapes: B rows, T tokens of context, N rows of a validation split.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data import tokenizer as tokenizers
from data.corpus import Corpus

IGNORED = -100  # the target of a place where nothing is learned, as in torch's cross-entropy
SAMPLINGS = ("crops", "epochs")
NO_MARK = "infill and answers mark the parts of a row with a token that no text has: use data.tokenizer=byte or bpe"
Batch = tuple[Tensor, Tensor]  # inputs and targets (B, T), int64


class Objective(ABC):
    """The batches of training, and the validation, of one kind of prediction.

    `objective(step)` is the batch of step 0, 1, ...: a pure function of (seed, step). No step
    depends on the ones before, so resuming, evaluating or sampling cannot shift the data.
    """

    #: True if its rows have parts, with a mark between them: a token that no text has.
    marks = False
    #: True if a part of a row is not learned, or is padding.
    partial = False

    def __init__(self, corpus: Corpus, *, rows: int, length: int, seed: int, sampling: str) -> None:
        self.corpus, self.rows, self.length, self.seed = corpus, rows, length, seed
        self.sampling = sampling
        mark = tokenizers.mark_of(corpus.tokenizer) if self.marks else 0
        if mark is None:
            raise ValueError(f"{NO_MARK}; this one has no {tokenizers.END_OF_TEXT}")
        self.mark = mark  # also the padding, which is not learned

    @classmethod
    def check(cls, own: Mapping[str, Any], tokenizer: str) -> None:
        """Raise ValueError for keys of its own, or a kind of tokenizer, that cannot be, before any
        text is read."""
        del own  # most have none
        if cls.marks and tokenizer == "char":
            raise ValueError(f"{NO_MARK}, not char")

    @abstractmethod
    def __call__(self, step: int) -> Batch:
        """Inputs and targets (B, T), int64; a target of -100 is not learned."""

    @property
    def validation_rows(self) -> Batch | None:
        """Inputs and targets (N, T) to validate on; None: every token of the validation text."""
        return None

    @property
    def validation_tokens(self) -> int:
        """Tokens that one validation reads; 0 without a validation split."""
        return 0 if self.corpus.val is None else len(self.corpus.val)

    @property
    def validation_bytes(self) -> int | None:
        """UTF-8 bytes of all that a validation scores; None where it does not score a text."""
        return self.corpus.split("val")[1]

    @property
    def validation_floor(self) -> float | None:
        """Nats per token of a perfect model that validates in the same windows of T tokens.

        None where it is not known: of other sources and tokenizers, and for documents that do not fit
        into a window.
        """
        floor = self.corpus.floor
        if floor is None or self.validation_rows is not None:
            return None
        if self.corpus.documents["val"][:, 1].max() > self.length + 1:
            return None
        cuts = floor[:: self.length, 1]
        return float((floor[1:, 0].sum() + cuts.sum()) / (len(floor) - 1))

    @property
    def prompt(self) -> list[int]:
        """What a sample of the trained model continues: a line break, if the vocabulary has one."""
        try:
            return tokenizers.encode(self.corpus.tokenizer, "\n")
        except ValueError:
            return self.corpus.train[:1].tolist()

    def random(self, *index: int) -> np.random.Generator:
        """A generator for a part of the data, from the seed and its index."""
        # Not torch's generator: on a CPU it uses 32 bits of its seed, too few for two numbers.
        return np.random.default_rng((self.seed, *index))


class Draws:
    """Which of many items the rows of a step show.

    `crops` draws with replacement. `epochs` shows all items, in an order shuffled for each epoch,
    before any comes again.
    """

    def __init__(self, objective: Objective, items: int) -> None:
        self.objective, self.items = objective, items
        self.order = lru_cache(maxsize=2)(self.shuffled)  # a batch may reach into the next epoch

    def __call__(self, step: int) -> Tensor:
        """The items of a step: (B,), int64."""
        rows = self.objective.rows
        if self.objective.sampling == "crops":
            return torch.from_numpy(self.objective.random(step).integers(self.items, size=rows))
        drawn = np.arange(step * rows, (step + 1) * rows)  # since the first step
        epoch, place = np.divmod(drawn, self.items)
        needed = range(epoch[0], epoch[-1] + 1)
        return torch.from_numpy(np.concatenate([self.order(e)[place[epoch == e]] for e in needed]))

    def shuffled(self, epoch: int) -> NDArray[np.int64]:
        """The order in which an epoch visits all items."""
        return self.objective.random(epoch).permutation(self.items)


class Documents:
    """The documents of a split, as token ids."""

    def __init__(self, corpus: Corpus, split: str, least: int = 1) -> None:
        """Those with at least so many tokens."""
        self.tokens = corpus.split(split)[0]
        table = corpus.documents[split]
        self.spans = table[table[:, 1] >= least, :2]  # first token, tokens

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, number: int) -> list[int]:
        first, size = self.spans[number]
        return self.tokens[first : first + size].tolist()


def as_batch(rows: list[list[int]], length: int, padding: int) -> Batch:
    """Rows of at most T + 1 tokens as inputs and targets (B, T), padded; the padding is not learned."""
    inputs, targets = (
        torch.full((len(rows), length), padding),
        torch.full((len(rows), length), IGNORED),
    )
    for into, learned, row in zip(inputs, targets, rows, strict=True):
        shown = row[:length]
        into[: len(shown)] = torch.tensor(shown)
        learned[: len(row) - 1] = torch.tensor(row[1:])
    return inputs, targets


def check_sampling(*, sampling: str) -> None:
    """Raise ValueError for a way of drawing rows that does not exist."""
    if sampling not in SAMPLINGS:
        raise ValueError(f"data.sampling={sampling} is not one of {', '.join(SAMPLINGS)}")
