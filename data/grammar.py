"""Text of a probabilistic context-free grammar: endless, and the loss of a perfect model is known.

Shapes: S symbols of a level, A symbols of the level above, R rules of each, K symbols of the longest
rule, n characters of a sentence.
"""

from functools import reduce
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

LETTERS = "abcdefgh"
MOST_RULES = 8  # of a symbol
LONGEST_SENTENCE = 256  # characters: a floor takes n^3 operations, and float64 must hold p
DEEPEST = 8  # levels: two symbols to a power above that are more
VALIDATION = 40  # training characters for each one of validation
CONCENTRATION = 2.0  # of the Dirichlet distribution of a symbol's rules

Floats = NDArray[np.float64]


class Level(NamedTuple):
    """The rules of a level: the symbols that replace each symbol, and the probability of each rule."""

    children: NDArray[np.int64]  # (A, R, K), from 1; 0 is no symbol
    p: Floats  # (A, R)


class Spans(NamedTuple):
    """Probabilities of a symbol for each stretch i to j of a sentence, each (..., n + 1, n + 1).

    That the symbol becomes the stretch (`whole`), becomes what begins with it and goes on
    (`opening`), or what has begun before and ends with it (`closing`).
    """

    whole: Floats
    opening: Floats
    closing: Floats


class Grammar:
    """Sentences of a random grammar, a pure function of `seed`; nothing is downloaded.

    As in cfg3 of Allen-Zhu and Li 2023 (Physics of language models, part 1,
    https://arxiv.org/abs/2305.13673), a sentence is a symbol that is replaced `depth` times, each
    time all its symbols by those of the next level; the last level's are letters. Each symbol has so
    many `rules`, of 2 to `longest` symbols. No two rules of a level have the same symbols, but
    letters do not show where a rule begins. Here the rules of a symbol have probabilities of their
    own, drawn with the grammar. A document is a sentence and a line break. Training has about so many
    `tokens`, a character each; validation has a fortieth, drawn apart. Raises ValueError for too few
    or too many of these.
    """

    def __init__(
        self, *, depth: int, symbols: int, rules: int, longest: int, tokens: int, seed: int
    ) -> None:
        if not 2 <= symbols <= len(LETTERS):
            raise ValueError(
                f"data.symbols={symbols} must be at least 2 and at most {len(LETTERS)}"
            )
        if not 2 <= longest <= 4:
            raise ValueError(f"data.longest={longest} must be at least 2 and at most 4")
        if not 1 <= depth <= DEEPEST or longest**depth > LONGEST_SENTENCE:
            raise ValueError(
                f"data.depth={depth} must be at least 1, and data.longest={longest} to this power at "
                f"most {LONGEST_SENTENCE}: so long is the longest sentence"
            )
        bodies = [
            s for k in range(2, longest + 1) for s in product(range(1, symbols + 1), repeat=k)
        ]
        most = min(MOST_RULES, len(bodies) // symbols)
        if not 1 <= rules <= most:
            raise ValueError(
                f"data.rules={rules} must be at least 1 and at most {most} with "
                f"data.symbols={symbols} and data.longest={longest}"
            )
        if tokens < 1 or seed < 0:
            raise ValueError(
                f"data.tokens={tokens} must be at least 1, data.seed={seed} at least 0"
            )
        self.options = (depth, symbols, rules, longest, tokens, seed)
        self.tokens, self.seed = tokens, seed
        random = np.random.default_rng((seed, 0))
        above = [1] + [symbols] * (depth - 1)
        self.levels = [draw_level(bodies, count, rules, random) for count in above]
        self.characters = LETTERS[:symbols] + "\n"
        self.counts = self.expected_counts()

    def key(self) -> str:
        return f"grammar:1:{self.options}"

    def load(self) -> dict[str, list[str]]:
        validation = max(1, self.tokens // VALIDATION)
        return {"train": self.sentences(self.tokens, 1), "val": self.sentences(validation, 2)}

    def sentences(self, tokens: int, part: int) -> list[str]:
        """About so many characters of sentences; those of another part are drawn apart."""
        random = np.random.default_rng((self.seed, part))
        count = max(1, round(tokens / self.counts.sum()))
        symbols, sentence = np.ones(count, np.int64), np.arange(count)
        for children, p in self.levels:
            bounds = p.cumsum(1)[symbols - 1, :-1]
            rule = (random.random((len(symbols), 1)) > bounds).sum(1)
            drawn = children[symbols - 1, rule]
            sentence = sentence.repeat((drawn > 0).sum(1))
            symbols = drawn[drawn > 0]
        text = "".join(self.characters[symbol - 1] for symbol in symbols.tolist())
        ends = np.bincount(sentence).cumsum().tolist()
        return [f"{text[start:end]}\n" for start, end in zip([0, *ends], ends, strict=False)]

    def expected_counts(self) -> Floats:
        """How often each character comes in a document, on average: (S + 1,)."""
        counts = np.ones(1)
        for children, p in self.levels:
            uses = (children[..., None] == np.arange(1, len(self.characters))).sum(2)  # (A, R, S)
            counts = np.einsum("a,ar,ars->s", counts, p, uses)
        return np.append(counts, 1.0)

    def floor(self, documents: list[str]) -> Floats:
        """The nats of a perfect model for each character of sentences of this grammar, and of a cut: (N, 2).

        First those of the character, after all of its document before it. Then the nats that the
        rest of the document costs more if the reader begins with this character, anywhere in an
        endless text, as the window of a model does. Raises ValueError for what is no sentence of it.
        """
        return np.concatenate([self.floor_of(document) for document in documents])

    def floor_of(self, document: str) -> Floats:
        """The floor of one document: (n + 1, 2)."""
        sentence, n = document[:-1], len(document) - 1
        spans = self.spans(sentence)
        if document != f"{sentence}\n" or not spans.whole[0, n]:
            raise ValueError(f"{document!r} is no sentence of this grammar and a line break")
        begun = np.append((spans.opening + spans.whole)[0], spans.whole[0, n])  # with the first i
        ended = (spans.closing + spans.whole)[:, n]  # with those from i on
        nats = -np.diff(np.log(begun))
        rest = nats[::-1].cumsum()[::-1] - nats
        first = self.counts[[self.characters.index(character) for character in document]]
        return np.stack([nats, np.log(first / ended) - rest], 1)

    def spans(self, sentence: str) -> Spans:
        """The spans of the first symbol, summed over all derivations (inside algorithm, Baker 1979).

        A rule's matrices are products of those of its symbols, level by level.
        """
        n, letters = len(sentence), self.characters[:-1]
        one, zero = np.eye(n + 1), np.zeros((n + 1, n + 1))
        whole = np.stack([np.diag([float(x == letter) for x in sentence], 1) for letter in letters])
        spans = Spans(whole, one + 0 * whole, one + 0 * whole)
        nothing = Spans(one[None], zero[None], zero[None])
        for children, p in reversed(self.levels):
            known = Spans(*map(np.concatenate, zip(nothing, spans, strict=True)))
            parts = (Spans(*(x[symbols] for x in known)) for symbols in np.moveaxis(children, 2, 0))
            rules = reduce(joined, parts)  # (A, R, n + 1, n + 1)
            spans = Spans(*(np.einsum("ar,arij->aij", p, x) for x in rules))
        return Spans(*(x[0] for x in spans))


def joined(one: Spans, two: Spans) -> Spans:
    """The spans of two symbols in a row."""
    return Spans(
        one.whole @ two.whole,
        one.opening + one.whole @ two.opening,
        two.closing + one.closing @ two.whole,
    )


def draw_level(
    bodies: list[tuple[int, ...]], above: int, rules: int, random: np.random.Generator
) -> Level:
    """Rules for so many symbols, all different, each length as likely."""
    sizes = np.array([len(body) for body in bodies])
    weights = 1 / np.bincount(sizes)[sizes]
    drawn = random.choice(len(bodies), above * rules, replace=False, p=weights / weights.sum())
    children = np.zeros((above * rules, sizes.max()), np.int64)
    for row, number in zip(children, drawn, strict=True):
        row[: sizes[number]] = bodies[number]
    p = random.dirichlet(np.full(rules, CONCENTRATION), above)
    return Level(children.reshape(above, rules, -1), p)
