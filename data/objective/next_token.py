"""The next token of a text, everywhere in it."""

from typing import Any

import torch

from data.corpus import Corpus
from data.objective.base import Batch, Draws, Objective


class NextToken(Objective):
    """Rows of consecutive tokens.

    `crops` begins a row anywhere. `epochs` cuts the text into rows and visits all of them before any
    comes again. Raises ValueError if the text does not fill one row.
    """

    def __init__(self, corpus: Corpus, **order: Any) -> None:
        super().__init__(corpus, **order)
        tokens, length = len(corpus.train), self.length
        if tokens < length + 1:
            raise ValueError(
                f"the training text has {tokens} tokens; a context of {length} needs at least "
                f"{length + 1}: shorten model.max_len or bring more text"
            )
        crops = self.sampling == "crops"
        self.apart = 1 if crops else length  # tokens between the places where a row may begin
        self.draws = Draws(self, (tokens - 1 - length) // self.apart + 1)
        self.window = torch.arange(length + 1)

    def __call__(self, step: int) -> Batch:
        starts = self.apart * self.draws(step)
        rows = self.corpus.train[starts[:, None] + self.window].long()  # (B, T + 1)
        return rows[:, :-1], rows[:, 1:]
