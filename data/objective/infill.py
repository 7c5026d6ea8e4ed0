"""Infilling: a document with a part cut out, then that part.

Shapes: B rows, T tokens of context.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from data.corpus import Corpus
from data.objective.base import Batch, Documents, Draws, Objective, as_batch
from data.objective.next_token import NextToken
from data.tokenizer import SPAN_MARKS, is_bytes

LEAST = 4  # tokens of a document
SPAN = 3  # mean tokens of one of many spans
MASKED = 0.15  # share of the tokens in many spans
TEXTS = ("documents", "rows")
SPANS = ("one", "many")


class Infill(Objective):
    """Rows `before MARK after MARK hidden MARK`, padded to the context.

    With `text=documents` they are made of documents, each from its start and cut to a length drawn
    from 4 to 7/8 T; with `text=rows`, of the rows of plain text that `NextToken` has, whole but for
    the room that the marks take. The hidden part is 1 token to half of it, so a quarter on average:
    the span corruption of the CS224n assignment on pretraining, and fill-in-the-middle (Bavarian et
    al. 2022, https://arxiv.org/abs/2207.14255) with the parts in another order. With `spans=many` a
    seventh of the tokens is hidden in spans of 3 on average, each behind its own mark, in order (T5,
    Raffel et al. 2020, https://arxiv.org/abs/1910.10683). The latter two need a tokenizer of bytes:
    with others the only mark is the end-of-text token, which stands between documents of a row.
    `rate` is the share of such rows; the others are plain text. Validation scores plain text, so that
    losses compare with other objectives'. Raises ValueError for choices that do not exist, documents
    that are all too short, and a context without room.
    """

    marks = partial = True

    def __init__(self, corpus: Corpus, *, rate: float, text: str, spans: str, **order: Any) -> None:
        super().__init__(corpus, **order)
        only = "byte" if is_bytes(corpus.tokenizer) else "another"
        self.check({"rate": rate, "text": text, "spans": spans}, only)
        self.rate = rate
        self.hide = hide_one if spans == "one" else hide_many
        marks = 3 if spans == "one" else 2 * len(SPAN_MARKS) + 1
        self.room = self.length + 1 - marks
        self.documents = Documents(corpus, "train", LEAST)
        if self.room < LEAST or not len(self.documents):
            raise ValueError(
                f"objective=infill needs documents of at least {LEAST} tokens, and "
                f"model.max_len={self.length} to be at least {LEAST + marks - 1}"
            )
        self.draws = Draws(self, len(self.documents)) if text == "documents" else None
        self.plain = NextToken(corpus, **order) if text == "rows" or rate < 1 else None

    @classmethod
    def check(cls, own: Mapping[str, Any], tokenizer: str) -> None:
        super().check(own, tokenizer)
        if not 0 < own["rate"] <= 1:
            raise ValueError(f"objective.rate={own['rate']} must be above 0 and at most 1")
        for key, known in (("text", TEXTS), ("spans", SPANS)):
            if own[key] not in known:
                raise ValueError(f"objective.{key}={own[key]} is not one of {', '.join(known)}")
            if own[key] != known[0] and tokenizer in ("bpe", "another"):
                raise ValueError(f"objective.{key}={own[key]} needs data.tokenizer=byte")

    def __call__(self, step: int) -> Batch:
        random = self.random(step, 1)  # `draws` uses (step,)
        infilled = torch.from_numpy(random.random(self.rows) < self.rate)[:, None]
        plain = self.plain(step) if self.plain else None
        rows = [self.hide(text, self.mark, random) for text in self.texts(step, plain, random)]
        inputs, targets = as_batch(rows, self.length, self.mark)
        if plain is None:
            return inputs, targets
        return torch.where(infilled, inputs, plain[0]), torch.where(infilled, targets, plain[1])

    def texts(
        self, step: int, plain: Batch | None, random: np.random.Generator
    ) -> Iterator[list[int]]:
        """The text of each row of a step."""
        if self.draws is None:
            assert plain is not None
            yield from plain[0][:, : self.room].tolist()
            return
        longest = min(7 * self.length // 8, self.room)
        for number in self.draws(step):
            document = self.documents[int(number)]
            yield document[: int(random.integers(LEAST, min(longest, len(document)) + 1))]


def hide_one(text: list[int], mark: int, random: np.random.Generator) -> list[int]:
    """One part of a text hidden, of 1 token to half of them."""
    size = int(random.integers(1, len(text) // 2 + 1))
    return without_part(text, int(random.integers(len(text) - size + 1)), size, mark)


def without_part(text: list[int], start: int, size: int, mark: int) -> list[int]:
    """What is before a part of a text, what is after it, then the part: a mark after each."""
    before, hidden, after = text[:start], text[start : start + size], text[start + size :]
    return [*before, mark, *after, mark, *hidden, mark]


def hide_many(text: list[int], mark: int, random: np.random.Generator) -> list[int]:
    """Spans of a text hidden, as many as there are marks for, none beside another."""
    hidden = max(1, round(MASKED * len(text)))
    count = min(max(1, round(hidden / SPAN)), len(SPAN_MARKS), len(text) - hidden)
    kept = parts(len(text) - hidden, count, random)
    return join_spans(text, kept, parts(hidden, count, random), mark)


def join_spans(text: list[int], kept: list[int], hidden: list[int], mark: int) -> list[int]:
    """A text in which kept and hidden spans alternate, by their lengths: what is kept, with a mark for
    each hidden span; then each mark with what it hides; then the closing mark."""
    shown: list[int] = []
    answer: list[int] = []
    place = 0
    for span, keep, hide in zip(SPAN_MARKS, kept, hidden, strict=False):
        shown += [*text[place : place + keep], span]
        answer += [span, *text[place + keep : place + keep + hide]]
        place += keep + hide
    return [*shown, *text[place:], *answer, mark]


def parts(total: int, count: int, random: np.random.Generator) -> list[int]:
    """A number as a sum of so many, each at least 1; every such sum is equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff([0, *cuts, total]).tolist()
