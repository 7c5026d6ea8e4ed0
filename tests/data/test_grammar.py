"""The grammar's text is drawn from it, and its floor is the loss of a model that knows it."""

import json
import math
from collections import Counter, defaultdict
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from tiny import RUN, Documents, corpus
from torch import Tensor

from data.grammar import Grammar
from data.objective.next_token import NextToken
from model.loss import token_nll
from model.transformer import Transformer
from train.config.compose import compose
from train.run import run_training

OPTIONS = {"depth": 2, "symbols": 2, "rules": 3, "longest": 3, "tokens": 8000, "seed": 5}
RUN_KEYS = [f"data.{key}={value}" for key, value in OPTIONS.items()]


def grammar(**options: int) -> Grammar:
    return Grammar(**OPTIONS | options)


def derivations(made: Grammar, level: int = 0, symbol: int = 1) -> list[tuple[str, float]]:
    """What a symbol becomes and how likely, once for each way to derive it."""
    if level == len(made.levels):
        return [("abcd"[symbol - 1], 1.0)]
    found = []
    children, p = made.levels[level]
    for body, chance in zip(children[symbol - 1], p[symbol - 1], strict=True):
        parts = [derivations(made, level + 1, int(child)) for child in body if child]
        for chosen in product(*parts):
            likely = math.prod(part for _, part in chosen)
            found.append(("".join(text for text, _ in chosen), float(chance) * likely))
    return found


def documents(made: Grammar) -> dict[str, float]:
    """All documents of a small grammar, with their probabilities."""
    total: dict[str, float] = defaultdict(float)
    for text, p in derivations(made):
        total[f"{text}\n"] += p
    return total


def occurrences(known: dict[str, float], text: str) -> float:
    """How often a stretch of endless text comes for each document of it, on average."""
    first, *others = text.splitlines(keepends=True)
    if not first.endswith("\n"):
        places = range(len(max(known, key=len)))
        return sum(p * sum(d.startswith(first, i) for i in places) for d, p in known.items())
    total = sum(p for d, p in known.items() if d.endswith(first))
    for other in others:
        total *= sum(p for d, p in known.items() if d == other or d.startswith(other))
    return total


def test_documents_are_as_likely_as_all_their_derivations_together() -> None:
    made = grammar()
    known = documents(made)
    assert len(known) < len(derivations(made))  # some are ambiguous
    assert sum(known.values()) == pytest.approx(1)
    for document, p in known.items():
        assert made.floor([document])[:, 0].sum() == pytest.approx(-math.log(p))


@pytest.mark.parametrize("seed", range(3))
def test_the_floor_of_a_character_is_its_share_of_the_documents_that_begin_alike(seed: int) -> None:
    made = grammar(seed=seed)
    known = documents(made)

    def begun(text: str) -> float:
        return sum(p for document, p in known.items() if document.startswith(text))

    for document in known:
        shares = [begun(document[: i + 1]) / begun(document[:i]) for i in range(len(document))]
        assert np.exp(-made.floor([document])[:, 0]) == pytest.approx(shares)


@pytest.mark.parametrize("seed", range(3))
def test_a_cut_costs_what_the_characters_before_it_would_have_told(seed: int) -> None:
    made = grammar(seed=seed)
    known = documents(made)
    for document in known:
        nats, cut = made.floor([document]).T
        for i in range(len(document)):
            rest = occurrences(known, document[i:]) / occurrences(known, document[i])
            assert cut[i] == pytest.approx(-math.log(rest) - nats[i + 1 :].sum())


def test_the_floor_of_rules_of_two_symbols_is_the_entropy_of_their_choices() -> None:
    """They are unambiguous: a symbol's entropy is that of its rules and of what follows from them."""
    made = grammar(depth=3, longest=2, symbols=3, rules=2)
    entropy = np.zeros(3)
    for children, p in reversed(made.levels):
        entropy = (p * (np.append(0, entropy)[children].sum(2) - np.log(p))).sum(1)
    nats = sum(p * made.floor([d])[:, 0].sum() for d, p in documents(made).items())
    assert nats == pytest.approx(entropy[0])


def test_text_is_drawn_as_often_as_it_is_likely() -> None:
    made = grammar(tokens=200_000)
    known = documents(made)
    parts = made.load()
    for part, tokens in (("train", 200_000), ("val", 5_000)):
        drawn = Counter(parts[part])
        assert drawn.keys() <= known.keys()
        assert sum(map(len, parts[part])) == pytest.approx(tokens, rel=0.05)
        n = drawn.total()
        for document, p in known.items():
            assert abs(drawn[document] - n * p) < 5 * math.sqrt(n * p) + 5
    counts = Counter("".join(parts["train"]))
    for letter, expected in zip(made.characters, made.counts, strict=True):
        assert counts[letter] / counts["\n"] == pytest.approx(expected, rel=0.02)


def test_text_and_key_follow_from_every_option() -> None:
    options = {"depth": 3, "rules": 2}
    first = grammar(**options)
    assert first.load() == grammar(**options).load()
    assert first.key() == grammar(**options).key()
    for option, other in (("depth", 4), ("symbols", 3), ("rules", 1), ("longest", 2), ("tokens", 5000), ("seed", 6)):  # fmt: skip
        changed = grammar(**options | {option: other})
        assert changed.key() != first.key()
        assert changed.load()["val"] != first.load()["val"]


def test_validation_is_drawn_apart() -> None:
    made = grammar(depth=4, symbols=4, rules=3, tokens=20_000)
    parts = made.load()
    assert made.sentences(500, 2) == parts["val"]
    assert made.sentences(500, 1) != parts["val"]
    assert len(set(parts["val"]) & set(parts["train"])) < len(parts["val"]) / 10


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 0}, "data.depth=0 must be at least 1, and data.longest=3 to this power at most"),
        ({"depth": 6}, "data.depth=6 must be at least 1, and data.longest=3 to this power at most"),
        ({"depth": 10**9}, "data.depth=1000000000 must be at least 1, and data.longest=3"),
        ({"symbols": 1}, "data.symbols=1 must be at least 2 and at most 8"),
        ({"symbols": 9}, "data.symbols=9 must be at least 2 and at most 8"),
        (
            {"rules": 0},
            "data.rules=0 must be at least 1 and at most 6 with data.symbols=2 and data.longest=3",
        ),
        (
            {"rules": 9, "symbols": 4},
            "data.rules=9 must be at least 1 and at most 8 with data.symbols=4",
        ),
        ({"longest": 1}, "data.longest=1 must be at least 2 and at most 4"),
        ({"longest": 5}, "data.longest=5 must be at least 2 and at most 4"),
        ({"tokens": 0}, "data.tokens=0 must be at least 1, data.seed=5 at least 0"),
        ({"seed": -1}, "data.tokens=8000 must be at least 1, data.seed=-1 at least 0"),
    ],
)
def test_grammars_that_cannot_be_are_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grammar(**wrong)


def test_what_is_no_document_has_no_floor() -> None:
    made = grammar()
    known = next(iter(documents(made)))
    for document in ("", "\n", "a", "aa", "az\n", 30 * "a" + "\n", known[:-1] + "a", known + known):
        with pytest.raises(ValueError, match="is no sentence of this grammar and a line break"):
            made.floor([document])


# The floor of a validation


class Perfect:
    """A model that knows the grammar and nothing but the window that it reads."""

    def __init__(self, made: Grammar) -> None:
        known = documents(made)
        self.characters = "".join(sorted(made.characters))
        self.occurrences = cache(lambda text: occurrences(known, text))
        self.head = lambda log_p: log_p

    def hidden(self, tokens: Tensor) -> Tensor:
        rows = ["".join(self.characters[i] for i in row) for row in tokens.tolist()]
        return torch.tensor([[self.after(r[: i + 1]) for i in range(len(r))] for r in rows]).log()

    def after(self, text: str) -> list[float]:
        """Probabilities of all characters after a text."""
        likely = [self.occurrences(text + character) for character in self.characters]
        return [x / sum(likely) for x in likely]


class Rows(NextToken):
    """Validates on rows, not on the text."""

    validation_rows = torch.zeros(2, 16), torch.zeros(2, 16)


def objective(
    made: object, tmp_path: Path, length: int, kind: type[NextToken] = NextToken, **options: object
) -> NextToken:
    read = corpus(made, tmp_path, **options)
    return kind(read, rows=2, length=length, seed=0, sampling="crops")


@pytest.mark.parametrize("length", [9, 10, 16, 300])
def test_the_floor_is_the_validation_loss_of_a_perfect_model(tmp_path: Path, length: int) -> None:
    """With windows as short as the longest document, and one that holds all of the text."""
    made = grammar()
    found = objective(made, tmp_path, length)
    assert len(max(made.load()["val"], key=len)) == 10
    nats = token_nll(
        cast(Transformer, Perfect(made)), found.corpus.split("val")[0],
        context=length, stride=length, batch_size=7, device="cpu",
    )  # fmt: skip
    assert found.validation_floor == pytest.approx(nats.double().mean().item(), rel=1e-5)


def test_tokens_have_a_floor_where_they_are_characters_and_documents_fit(tmp_path: Path) -> None:
    made = grammar()
    floor = objective(made, tmp_path, 16).validation_floor
    assert floor is not None
    assert objective(made, tmp_path, 16, tokenizer="byte").validation_floor == floor
    assert objective(made, tmp_path, 16, tokenizer="bpe").validation_floor is None
    assert objective(made, tmp_path, 8).validation_floor is None
    assert objective(made, tmp_path, 16, Rows).validation_floor is None
    text = made.load()
    unknown = Documents(*text["train"], val=text["val"])
    assert objective(unknown, tmp_path, 16).validation_floor is None


def test_a_run_records_its_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [override for override in RUN if not override.startswith("data")]
    summaries: dict[str, Any] = {}
    for name, overrides in (("plain", ()), ("latents", ("model.latents=8",))):
        places = [f"data.cache={tmp_path}", f"out={tmp_path}/{name}", "steps=2", *overrides]
        assert run_training(compose([*plain, "data=grammar", *RUN_KEYS, *places])) == 0
        summaries[name] = json.loads((tmp_path / name / "summary.json").read_text())
    floor = objective(grammar(), tmp_path, 16).validation_floor
    assert summaries["plain"]["entropy_floor"] == floor
    above = summaries["plain"]["val_loss"] - floor
    assert f"above the entropy      {above:.4f} nats per token" in capsys.readouterr().out
    assert summaries["latents"]["entropy_floor"] is None  # its windows overlap
