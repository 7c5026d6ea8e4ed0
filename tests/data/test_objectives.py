"""Objectives: the batch of a step is a pure function of (seed, step); rows of text, parts, answers."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from data import tokenizer as tokenizers
from data.characters import Characters
from data.corpus import Corpus
from data.objective.answers import Answers
from data.objective.base import IGNORED, Draws, check_sampling
from data.objective.infill import Infill, join_spans, parts, without_part
from data.objective.next_token import NextToken
from data.people import ENDINGS, People
from data.source import Lines, Pairs
from data.tokenizer import MARK_BYTE as MARK
from data.tokenizer import SPAN_MARKS

TOKENS = torch.arange(1000).to(torch.uint16)


def batches(
    sampling: str, *, rows: int = 8, length: int = 16, seed: int = 0, text: torch.Tensor = TOKENS
) -> NextToken:
    corpus = cast(Corpus, SimpleNamespace(train=text, val=None))
    return NextToken(corpus, rows=rows, length=length, seed=seed, sampling=sampling)


@pytest.mark.parametrize("sampling", ["crops", "epochs"])
def test_a_batch_depends_on_seed_and_step_alone(sampling: str) -> None:
    one, other = batches(sampling), batches(sampling)
    later = [other(step) for step in (7, 3, 0)]  # any order
    for step, (x, y) in zip((7, 3, 0), later, strict=True):
        assert torch.equal(one(step)[0], x)
        assert torch.equal(one(step)[1], y)
    assert not torch.equal(one(0)[0], one(1)[0])
    assert not torch.equal(one(0)[0], batches(sampling, seed=1)(0)[0])


@pytest.mark.parametrize("sampling", ["crops", "epochs"])
def test_targets_are_the_next_tokens(sampling: str) -> None:
    x, y = batches(sampling)(5)
    assert x.shape == y.shape == (8, 16)
    assert x.dtype == torch.int64
    assert torch.equal(x + 1, y)  # the tokens are 0, 1, 2, ...


def test_crops_reach_the_first_and_the_last_token() -> None:
    made = batches("crops", rows=64, text=TOKENS[:18])
    x, y = made(0)
    assert x.min() == 0
    assert y.max() == 17


def test_an_epoch_shows_every_row_once_in_a_new_order() -> None:
    made = batches("epochs", rows=7)  # 62 rows: epochs begin inside batches
    seen = torch.cat([made(step)[0][:, 0] for step in range(62)]).view(7, 62)
    everything = torch.arange(62) * 16
    for epoch in seen:
        assert torch.equal(epoch.sort().values, everything)
    assert not torch.equal(seen[0], seen[1])


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at every step: a permutation of all rows takes longer than a small model's step."""
    shuffled = []
    real = Draws.shuffled

    def counted(self: Draws, epoch: int) -> NDArray[np.int64]:
        shuffled.append(epoch)
        return real(self, epoch)

    monkeypatch.setattr(Draws, "shuffled", counted)
    made = batches("epochs", rows=7)
    for step in range(25):  # 175 rows, 62 an epoch
        made(step)
    assert shuffled == [0, 1, 2]


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    x, _ = batches("epochs", rows=200)(3)
    assert x.shape == (200, 16)


def test_too_little_text_and_unknown_samplings_are_refused() -> None:
    with pytest.raises(ValueError, match="has 16 tokens; a context of 16 needs at least 17"):
        batches("crops", rows=1, text=TOKENS[:16])
    with pytest.raises(ValueError, match="sampling=random is not one of crops, epochs"):
        check_sampling(sampling="random")


@dataclass
class Text:
    """The part of a corpus of bytes that an objective reads."""

    train: torch.Tensor
    val: torch.Tensor | None
    documents: dict[str, NDArray[np.int64]]
    tokenizer: Tokenizer = field(default_factory=tokenizers.raw_bytes)

    def split(self, name: str) -> tuple[torch.Tensor, int]:
        tokens = {"train": self.train, "val": self.val}[name]
        assert tokens is not None
        return tokens, len(tokens)


def corpus_of(train: list[str], val: list[str] | None = None) -> Corpus:
    """A corpus of byte tokens."""

    def table(texts: list[str]) -> NDArray[np.int64]:
        sizes = np.array([len(text.encode()) for text in texts])
        return np.stack([sizes.cumsum() - sizes, sizes, sizes], axis=1)

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.tensor(list("".join(texts).encode()))

    documents = {"train": table(train)} | ({"val": table(val)} if val else {})
    return cast(Corpus, Text(tokens(train), tokens(val) if val else None, documents))


def infill(
    corpus: Corpus, *, rows: int = 8, length: int = 128, seed: int = 0, **own: Any
) -> Infill:
    order = {"rows": rows, "length": length, "seed": seed, "sampling": "epochs"}
    return Infill(corpus, **{"rate": 1.0, "text": "documents", "spans": "one"} | own, **order)


def answers(corpus: Corpus, *, rows: int = 2, length: int = 32, seed: int = 0) -> Answers:
    return Answers(corpus, rows=rows, length=length, seed=seed, sampling="epochs")


def row_of(inputs: torch.Tensor, targets: torch.Tensor) -> list[int]:
    """The tokens of a row before its padding."""
    row = [int(inputs[0]), *targets.tolist()]
    return row[: row.index(IGNORED)] if IGNORED in row else row


LONG = [f"{number} " + "abcdefghijklmnopqrstuvwxyz" * 6 for number in range(40)]


def test_a_hidden_part_follows_the_text_without_it() -> None:
    row = without_part(list(b"Jacob Henry"), 4, 3, MARK)
    assert bytes(row) == b"Jaco\xffenry\xffb H\xff"


def test_many_spans_are_hidden_as_in_t5() -> None:
    text = "Thank you for inviting me to your party last week"
    kept, hidden = (
        [len("Thank you "), len(" me to your party ")],
        [len("for inviting"), len("last")],
    )
    row = bytes(join_spans(list(text.encode()), kept, hidden, MARK))
    x, y = SPAN_MARKS[:2]
    shown = b"Thank you %c me to your party %c week" % (x, y)
    assert row == shown + b"%cfor inviting%clast%c" % (x, y, MARK)


def test_parts_of_a_number_are_positive_and_any() -> None:
    random = np.random.default_rng(0)
    seen = {tuple(parts(5, 3, random)) for _ in range(200)}
    assert seen == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}


def test_infilling_cuts_documents_to_all_lengths_and_hides_up_to_half() -> None:
    made = infill(corpus_of(LONG), rows=64)
    sizes, shares = set(), []
    for step in range(60):
        for inputs, targets in zip(*made(step), strict=True):
            row = bytes(row_of(inputs, targets))
            before, after, hidden, end = row.split(b"\xff")
            whole = before + hidden + after
            assert end == b""
            assert any(text.encode().startswith(whole) for text in LONG)
            sizes.add(len(whole))
            shares.append(len(hidden) / len(whole))
    assert sizes == set(range(4, 113))
    assert 0 < min(shares) < 0.05
    assert 0.45 < max(shares) <= 0.5
    assert 0.2 < np.mean(shares) < 0.3


def test_rows_of_plain_text_are_infilled_whole() -> None:
    """The text is that of the same step of the plain objective, but for the room of the marks."""
    corpus = corpus_of(LONG)
    order = {"rows": 8, "length": 64, "seed": 0, "sampling": "crops"}
    made = Infill(corpus, rate=1.0, text="rows", spans="one", **order)
    texts = NextToken(corpus, **order)(3)[0]
    for inputs, targets, text in zip(*made(3), texts, strict=True):
        before, after, hidden, _ = bytes(row_of(inputs, targets)).split(b"\xff")
        assert before + hidden + after == bytes(text[:62].tolist())


def test_many_spans_give_the_document_back() -> None:
    made = infill(corpus_of(LONG), rows=64, spans="many")
    for inputs, targets in zip(*made(0), strict=True):
        row = row_of(inputs, targets)
        marks = [token for token in row if token in SPAN_MARKS]
        count = len(marks) // 2
        assert marks == [*SPAN_MARKS[:count]] * 2
        assert row[-1] == MARK
        second = [place for place, token in enumerate(row) if token == SPAN_MARKS[0]][1]
        shown, hidden = row[:second], row[second:-1]
        for mark, following in zip(SPAN_MARKS[:count], [*SPAN_MARKS[1:count], None], strict=True):
            end = hidden.index(following) if following else len(hidden)
            at = shown.index(mark)
            shown[at : at + 1] = hidden[hidden.index(mark) + 1 : end]
        assert any(text.encode().startswith(bytes(shown)) for text in LONG)
        assert 0.1 < sum(t not in SPAN_MARKS for t in hidden) / len(shown) < 0.3


@pytest.mark.parametrize("objective", [infill, partial(infill, rate=0.5), answers])
def test_other_objectives_depend_on_seed_and_step_alone_too(objective: Any) -> None:
    corpus = corpus_of([f"who is number {n:03}?\tperson {n:03}" for n in range(50)])
    one, other = objective(corpus, length=40), objective(corpus, length=40)
    for step in (7, 3, 0):
        assert all(map(torch.equal, one(step), other(step)))
    assert not torch.equal(one(0)[0], one(1)[0])
    assert not torch.equal(one(0)[0], objective(corpus, length=40, seed=1)(0)[0])


def test_a_share_of_the_rows_is_infilled_and_the_others_are_text() -> None:
    corpus = corpus_of(LONG)
    marked = 0
    for step in range(20):
        for inputs, targets in zip(*infill(corpus, rows=50, rate=0.3)(step), strict=True):
            if MARK in inputs:
                marked += 1
            else:
                text = bytes([int(inputs[0]), *targets.tolist()])
                assert text in "".join(LONG).encode()
    assert 250 < marked < 350


def test_padding_is_never_learned_and_all_else_is() -> None:
    for inputs, targets in zip(*infill(corpus_of(LONG), rows=64)(0), strict=True):
        row = row_of(inputs, targets)
        assert row.count(MARK) == 3
        assert row[-1] == MARK  # the last token learned
        assert targets[len(row) - 1 :].eq(IGNORED).all()
        assert inputs[len(row) :].eq(MARK).all()
        assert inputs[: len(row)].tolist() == row


def test_the_answer_and_both_marks_are_learned_and_not_the_question() -> None:
    made = answers(corpus_of(["Where?\tRome", "Who?\tMax"], ["Where is\tOslo\tknown"]), length=14)
    inputs, targets = made.batch(made.train[:1])
    assert bytes(inputs[0].tolist()) == b"Where?\xffRome\xff\xff\xff"
    assert targets[0].tolist() == [IGNORED] * 5 + [*b"\xffRome\xff"] + [IGNORED] * 3
    rows = made.validation_rows
    assert rows is not None
    assert bytes(rows[0][0].tolist()) == b"Where is\xffOslo\xff"
    assert (made.val[0].group, made.validation_tokens) == ([*b"known"], 14)


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["no tab"], r"question 1 of train, 'no tab', is not QUESTION<tab>ANSWER"),
        (["a\tb", "a\t"], r"question 2 of train, 'a\\t', is not QUESTION<tab>ANSWER"),
        (["a\tb\tc\td"], "is not QUESTION<tab>ANSWER"),
        (["q" * 20 + "\tanswer"], "needs model.max_len=27, and there are 16"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(documents: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        answers(corpus_of(documents), length=16)


def test_marks_need_a_tokenizer_of_bytes_and_documents_room_for_a_part() -> None:
    corpus = corpus_of(["a\tb", "c\td"])
    with pytest.raises(ValueError, match="documents of at least 4 tokens"):
        infill(corpus)
    with pytest.raises(ValueError, match="model.max_len=5 to be at least 6"):
        infill(corpus_of(LONG), length=5)
    corpus = replace(cast(Any, corpus), tokenizer=tokenizers.characters("abcd\t"))
    for objective in (infill, answers):
        with pytest.raises(ValueError, match="use data.tokenizer=byte or bpe; this one has no"):
            objective(corpus)


def test_people_are_those_of_their_seed_and_strangers_have_no_biography() -> None:
    options = {"people": 200, "places": 20, "cue": 1.0, "paraphrases": 3}
    parts = {
        part: People(part=part, seed=0, **options).load() for part in ("biographies", "questions")
    }
    assert parts["questions"] == People(part="questions", seed=0, **options).load()
    assert parts["questions"] != People(part="questions", seed=1, **options).load()
    told, asked = "\n".join(parts["biographies"]["train"]), parts["questions"]
    assert len(parts["biographies"]["train"]) == 150 * 3
    assert [len(asked["train"]), len(asked["val"])] == [100, 100]
    names: dict[str, str] = {}
    for line in [*asked["train"], *asked["val"]]:
        question, place, *group = line.split("\t")
        place = place.removeprefix(" ")  # for tokens that begin with one
        name = question.removeprefix("Where was ").removesuffix(" born?")
        assert names.setdefault(name, place) == place
        assert (name in told) is (group != ["stranger"])
        if group != ["stranger"]:
            assert any(name in text and place in text for text in parts["biographies"]["train"])
    assert len(names) == 200
    regions: dict[str, set[str]] = {}
    for name, place in names.items():
        ending = next(end for end in ENDINGS if name.endswith(end))
        regions.setdefault(ending, set()).add(place)
    assert max(map(len, regions.values())) <= 2  # of 20 places in 10 regions


def test_the_commonest_birthplace_of_a_hundred_is_that_of_five_in_a_hundred() -> None:
    options = {"people": 2000, "places": 100, "cue": 0.3, "paraphrases": 1}
    asked = People(part="questions", seed=0, **options).load()
    places = [line.split("\t")[1] for split in ("train", "val") for line in asked[split]]
    commonest = max(map(places.count, set(places))) / len(places)
    assert commonest == pytest.approx(0.051, abs=0.012)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"part": "names"}, "data.part=names is not one of biographies, questions"),
        ({"people": 4}, "data.people=4 must be at least 8"),
        ({"places": 5}, "data.places=5 must be at least 10"),
        ({"cue": 1.5}, "data.cue=1.5 must be at least 0"),
        ({"paraphrases": 0}, "data.paraphrases=0 must be at least 1"),
    ],
)
def test_people_that_cannot_be_are_refused(wrong: dict[str, Any], message: str) -> None:
    options = {"part": "questions", "people": 100, "places": 20, "cue": 0.3, "paraphrases": 1}
    with pytest.raises(ValueError, match=message):
        People(**options | wrong, seed=0)


def test_lines_and_pairs_are_documents(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("one\n\ntwo\n")
    (tmp_path / "train.tsv").write_text("Where?\tRome\nWho?\tMax\n")
    (tmp_path / "dev.tsv").write_text("When?\tnow\tknown\n")
    assert Lines(path=str(tmp_path / "lines.txt")).load() == {"train": ["one", "two"]}
    pairs = Pairs(train=str(tmp_path / "train.tsv"), dev=str(tmp_path / "dev.tsv"))
    assert pairs.load() == {"train": ["Where?\tRome", "Who?\tMax"], "val": ["When?\tnow\tknown"]}
    (tmp_path / "dev.tsv").write_text("When?\tnow\nno tab\n")
    with pytest.raises(ValueError, match=r"dev.tsv, line 2: 'no tab' is not QUESTION<tab>ANSWER"):
        Pairs(train=str(tmp_path / "train.tsv"), dev=str(tmp_path / "dev.tsv"))
    with pytest.raises(ValueError, match=r"data.dev=.*none.tsv: no such file"):
        Pairs(train=str(tmp_path / "train.tsv"), dev=str(tmp_path / "none.tsv"))


def test_characters_are_labelled_by_their_kind() -> None:
    parts = Characters(held_back=300, seed=0).load()
    assert len(parts["val"]) == 300
    assert len(parts["train"]) > 10_000
    pairs = [line.split("\t ") for split in ("train", "val") for line in parts[split]]
    kinds = dict(pairs)
    assert len(kinds) == len(pairs)
    assert kinds["GREEK SMALL LETTER ALPHA"] == "letter"
    assert kinds["DIGIT SEVEN"] == "number"
    assert kinds["PLUS SIGN"] == "symbol"
    assert parts != Characters(held_back=300, seed=1).load()
    with pytest.raises(ValueError, match="data.held_back=0 must be at least 1"):
        Characters(held_back=0, seed=0)
