"""Probes: each task's rows are right, and its answers alone are learned."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Documents, corpus

from data import tokenizer as tokenizers
from data.objective.base import IGNORED
from data.objective.probe import Probe
from data.probes.base import Task, letters
from data.probes.hops import Hops
from data.probes.induction import Induction
from data.probes.recall import Recall
from train.config.compose import choices_of, compose
from train.setup.build import build_source

NAMES = ("recall", "copy", "selective", "induction", "hops", "add")


def task(name: str, *overrides: str) -> Task:
    config = compose([f"data={name}", "data.rows=20", "data.val_rows=5", *overrides])
    source, _ = build_source(config["data"])
    assert isinstance(source, Task)
    return source


def answers(document: str) -> Iterator[tuple[str, str, str]]:
    """What is shown up to each answer of a document, the answer, and its group."""
    cells = document.split("\t")
    text = ""
    for shown, answer, group in zip(cells[:-1:3], cells[1::3], cells[2::3], strict=True):
        yield text + shown, answer, group
        text += shown + answer


def chain(text: str, hops: int) -> str:
    """The letter so many hops on, from pairs such as `abbc`, and a question such as `|2a`."""
    pairs, start = text.split("|")[0], text[-1]
    after = dict(zip(pairs[::2], pairs[1::2], strict=True))
    for _ in range(hops):
        start = after[start]
    return start


def total(text: str) -> str:
    """The sum that a row such as `73+58=` ends with asks for, its last digit first."""
    one, other = text.split(" ")[-1].removesuffix("=").split("+")
    return f"{int(one[::-1]) + int(other[::-1]):0{len(one) + 1}}"[::-1]


#: The answer by another way than the one that made it.
SOLVED = {
    "recall": lambda text: text[text.index(text[-1]) + 1],
    "copy": lambda text: text.removesuffix("|"),
    "selective": lambda text: text.removesuffix("|").replace(".", ""),
    "induction": lambda text: text[text.index("!") + 1],
    "hops": lambda text: chain(text, int(text[-2])),
    "add": total,
}


@pytest.mark.parametrize("name", NAMES)
def test_every_answer_follows_from_its_row(name: str) -> None:
    splits = task(name).load()
    for document in (*splits["train"], *splits["val"]):
        found = list(answers(document))
        assert found
        for text, answer, _ in found:
            assert SOLVED[name](text) == answer, (text, answer)


@pytest.mark.parametrize("name", NAMES)
def test_rows_follow_from_their_keys_and_validation_has_rows_of_its_own(name: str) -> None:
    one, other = task(name), task(name, "data.seed=1")
    assert one.load() == task(name).load()
    assert one.load()["train"] != other.load()["train"]
    assert one.key() != other.key()
    assert set(one.load()["train"]).isdisjoint(one.load()["val"])
    longer = task(name, "data.rows=30").load()  # more of one split leaves the other as it is
    assert longer["val"] == one.load()["val"]
    assert longer["train"][:20] == one.load()["train"]


@pytest.mark.parametrize("name", NAMES)
def test_levels_are_those_asked_for(name: str) -> None:
    made = task(name, "data.levels=[2]", "data.val_levels=[3,4]")
    groups = [group for document in made.load()["val"] for *_, group in answers(document)]
    assert list(dict.fromkeys(groups)) == [made.group(3), made.group(4)]
    trained = {group for document in made.load()["train"] for *_, group in answers(document)}
    assert trained == {made.group(2)}
    with pytest.raises(ValueError, match=r"data\.levels=\[0\] must be numbers of"):
        task(name, "data.levels=[0]")


def test_recall_asks_as_often_as_there_are_pairs_by_pairs_or_by_distance() -> None:
    made = task("recall", "data.levels=[4]", "data.val_levels=[4]", "data.by=distance")
    for document in made.load()["val"]:
        found = list(answers(document))
        assert len(document_text(document)) == 64
        assert len(found) == 4
        for text, _, group in found:
            distance = len(text) - 1 - text.rindex(text[-1], 0, -1)  # from where it was last seen
            first, last = map(int, group.split(" ")[0].split("-"))
            assert first <= distance <= last == first + 7


@pytest.mark.parametrize(
    ("name", "level", "candidates"),
    [
        ("recall", 4, lambda text: text[1:8:2]),
        ("recall", 16, lambda text: text[1:32:2]),
        ("hops", 4, lambda text: text[:22:2]),
    ],
)
def test_answers_already_shown_do_not_give_the_next_away(
    name: str, level: int, candidates: Callable[[str], str]
) -> None:
    made, draw = task(name), random.Random(0)
    kept, right, guessed = 0, 0.0, 0.0
    for _ in range(500):
        shown = list[str]()
        for text, answer, _ in answers(made.row(level, draw)):
            every = list(candidates(text))
            left = list(every)
            for letter in shown:
                if letter in left:
                    left.remove(letter)
            kept += 1
            right += left.count(answer) / max(1, len(left))
            guessed += every.count(answer) / len(every)
            shown.append(answer)
    assert right / kept < guessed / kept + 0.03


def document_text(document: str) -> str:
    cells = document.split("\t")
    return "".join(cell for n, cell in enumerate(cells) if n % 3 != 2)


def test_a_level_is_what_it_counts() -> None:
    draw = random.Random(0)
    (text, *_), *_ = answers(made("induction", level=7, draw=draw))
    assert len(text) - 1 - text.index("!") == 7
    (text, *_), *_ = answers(made("selective", level=7, draw=draw))
    assert sum(c.isalpha() for c in text) == 7
    assert len(text) == 65
    (text, answer, _), *_ = answers(made("add", level=7, draw=draw))
    assert (len(text), len(answer)) == (16, 8)


def made(name: str, *, level: int, draw: random.Random) -> str:
    return task(name).row(level, draw)


def test_letters_go_on_beyond_z() -> None:
    assert letters(27, "keys")[:26] == "abcdefghijklmnopqrstuvwxyz"
    assert letters(3, "values", capital=True) == "ABC"
    assert len(set(letters(500, "keys"))) == 500
    with pytest.raises(ValueError, match=r"data\.keys=9999 must be at most \d+"):
        letters(9999, "keys")
    with pytest.raises(ValueError, match=r"data\.keys=0 must be at least 1"):
        letters(0, "keys")


KEYS: dict[str, Any] = {"levels": [1], "val_levels": [1], "rows": 1, "val_rows": 1, "seed": 0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recall(**KEYS | {"levels": [5]}, length=16, keys=9, values=9, by="pairs"),
         r"data.levels=\[5\] must be numbers of pairs from 1 to 4"),
        (lambda: Recall(**KEYS, length=16, keys=9, values=9, by="gap"), "data.by=gap is not one of"),
        (lambda: Hops(**KEYS, nodes=9, letters=8), "data.nodes=9 must be at least 2 and at most"),
        (lambda: Hops(**KEYS | {"levels": [4]}, nodes=7, letters=8), "of hops from 1 to 3, the most"),
        (lambda: Induction(**KEYS, length=9, letters=8), "from 2 to 9"),
        (lambda: Recall(**KEYS | {"rows": 0}, length=16, keys=9, values=9, by="pairs"), "data.rows=0"),
    ],
)  # fmt: skip
def test_bad_keys_are_refused_by_name(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def objective(tmp_path: Path, *documents: str, length: int = 12) -> Probe:
    made = corpus(Documents(*documents, val=[documents[0]]), tmp_path)
    return Probe(made, rows=len(documents), length=length, seed=0, sampling="epochs")


def test_a_model_sees_texts_and_answers_and_learns_the_answers_alone(tmp_path: Path) -> None:
    probe = objective(tmp_path, "aXb\tYZ\tone\tc\tX\ttwo\t..", "kk\tL\tone\t")
    inputs, targets = probe.batch(probe.train)
    decode, (first, second) = tokenizers.decode, inputs.tolist()
    codec = probe.corpus.tokenizer
    assert decode(codec, first[:9]) == "aXbYZcX.."
    assert decode(codec, second[:3]) == "kkL"
    learned = [[t for t, target in enumerate(row) if target != IGNORED] for row in targets.tolist()]
    assert learned == [[2, 3, 5], [1]]  # the places before Y, Z, X and L
    assert decode(codec, targets[0][[2, 3, 5]].tolist()) == "YZX"
    assert decode(codec, targets[1][[1]].tolist()) == "L"


def test_a_batch_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    rows = [f"{letter}\t{letter}\tall\t" for letter in "abcdefgh"]
    one, other = objective(tmp_path, *rows), objective(tmp_path, *rows)
    later = [other(step)[0] for step in (2, 1)]
    assert torch.equal(one(2)[0], later[0])
    assert torch.equal(one(1)[0], later[1])
    assert sorted(one(0)[0][:, 0].tolist()) == sorted(set(one(1)[0][:, 0].tolist()))


def test_validation_scores_what_training_asks_for_if_it_asks_for_any(tmp_path: Path) -> None:
    rows = ["a\tb\tone\t", "c\td\ttwo\t"]
    for trained, scored in ((rows[:1], [0]), (rows, [0, 1]), (["e\tf\tsix\t"], [0, 1])):
        made = corpus(Documents(*trained, val=rows), tmp_path)
        probe = Probe(made, rows=1, length=4, seed=0, sampling="epochs")
        assert probe.scored == [probe.val[number] for number in scored]
        assert probe.validation_tokens == 4 * len(scored)
        assert len(probe.val) == 2  # accuracy is of all


def test_validation_is_of_all_its_rows(tmp_path: Path) -> None:
    probe = objective(tmp_path, "ab\tc\tone\t", "de\tf\tone\t")
    rows = probe.validation_rows
    assert rows is not None
    assert rows[0].shape == (1, 12)
    assert probe.validation_tokens == 12
    assert probe.validation_bytes is None
    assert tokenizers.decode(probe.corpus.tokenizer, probe.prompt) == "ab"


@pytest.mark.parametrize(
    "document", ["text alone", "a\tb\t", "a\t\tone\t", "\tb\tone\t", "a\tb\tone\tc\td"]
)
def test_a_document_of_another_form_is_named(tmp_path: Path, document: str) -> None:
    with pytest.raises(
        ValueError, match="row 1 of (val|train), .* is not TEXT<tab>ANSWER<tab>GROUP"
    ):
        objective(tmp_path, document)


def test_a_bad_row_far_behind_is_found_before_training(tmp_path: Path) -> None:
    rows = [f"{number}\tb\tone\t" for number in range(1500)]
    with pytest.raises(ValueError, match="row 1501 of train, 'text alone', is not TEXT"):
        objective(tmp_path, *rows, "text alone")


def test_a_corpus_may_have_no_validation_rows(tmp_path: Path) -> None:
    made = corpus(Documents("a\tb\tone\t"), tmp_path, val_fraction=0)
    probe = Probe(made, rows=1, length=4, seed=0, sampling="epochs")
    assert probe.validation_rows is None
    assert tokenizers.decode(made.tokenizer, probe.prompt) == "a"


def test_a_row_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"row 1 of train needs model\.max_len=4, and there are 3"):
        objective(tmp_path, "abcd\te\tone\t", length=3)
    assert objective(tmp_path, "abcd\te\tone\t", length=4).val


def test_a_probe_brings_its_objective() -> None:
    assert set(NAMES) <= set(choices_of("data"))
    for name in NAMES:
        assert compose([f"data={name}"])["choices"]["objective"] == "probe"
    assert compose(["data=recall", "objective=next"])["choices"]["objective"] == "next"
    assert compose([])["choices"]["objective"] == "next"
