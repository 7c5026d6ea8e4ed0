"""Answers to questions: what is said, how sure the model is, and what a report claims of it."""

import json
import math
import os
import re
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from tiny import RUN, eventually

from cli.evaluate import evaluate
from cli.train import train
from compare.evaluate.answers import (
    answered_by,
    described,
    greedy,
    items_within,
    sign_test,
    text_of,
    true_log_p,
)
from compare.evaluate.load import LoadedRun, RunSelector
from compare.report.analysis import Study
from compare.report.evaluations.exact_match import groups_of, levels_of
from compare.report.verdict.conclusions import answered as in_a_sentence
from compare.report.write import write
from compare.statistics.paired import correct, paired, wilson
from data.objective.answers import Answers, Question
from data.objective.probe import Probe
from model.cost import count_parameters
from model.generate import Sampler, generate
from train.config.compose import compose
from train.run import run_training
from train.setup.build import build_model
from train.sweep import evaluations
from train.sweep.plan import Cell
from train.sweep.processes import Stop
from train.sweep.run import say_share

#: A tiny run, on made-up people instead of a text.
TINY = [override for override in RUN if not override.startswith("data")]
PEOPLE = [
    "data=people",
    "data.people=24",
    "data.places=10",
    "data.paraphrases=2",
    "model.max_len=40",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three runs: biographies, questions after them, and the same questions alone."""
    folder = tmp_path_factory.mktemp("people")

    def train(name: str, *overrides: str) -> None:
        places = [f"data.cache={folder}/cache", f"out={folder}/{name}"]
        assert run_training(compose([*TINY, *PEOPLE, *places, "steps=6", *overrides])) == 0

    train("told", "objective=infill")
    asked = ["data.part=questions", "objective=answers"]
    train("after", *asked, f"init_from={folder}/told")
    train("alone", *asked)
    return folder


def opened(folder: Path) -> LoadedRun:
    return RunSelector(
        run=str(folder), checkpoint="latest", device="cpu", dtype="float32", threads=1
    ).load(folder)


def test_the_answer_is_what_greedy_generation_says(runs: Path) -> None:
    run = opened(runs / "after")
    objective = answered_by(run)
    assert isinstance(objective, Answers)
    for question in objective.val[:4]:
        said, _ = greedy(run.model, torch.tensor([question.prompt]), objective.mark, 6)
        sampler = Sampler(temperature=0)
        tokens = [t for (t,) in generate(run.model, question.prompt, 6, sampler=sampler, seed=0)]
        end = tokens.index(objective.mark) if objective.mark in tokens else 6
        assert said[0] == tokens[:end]


@torch.no_grad()
def test_the_log_probability_of_an_answer_is_that_of_its_tokens_and_the_closing_mark(
    runs: Path,
) -> None:
    """Whether it is generated or given."""
    run = opened(runs / "after")
    objective = answered_by(run)
    assert isinstance(objective, Answers)
    question = objective.val[0]
    said, own = greedy(run.model, torch.tensor([question.prompt]), objective.mark, 30)
    again = Question(question.question, said[0], [], objective.mark)
    true = true_log_p(run.model, objective, [again], "cpu")
    assert true == pytest.approx(own, abs=1e-4)
    logits = run.model(torch.tensor([again.row[:-1]]))[0].log_softmax(-1)
    places = range(len(question.prompt) - 1, len(again.row) - 1)
    assert sum(float(logits[t, again.row[t + 1]]) for t in places) == pytest.approx(
        own[0], abs=1e-4
    )


@pytest.mark.parametrize(("pos", "expected"), [("learned", 3_323_392), ("rope", 3_290_624)])
def test_the_model_of_the_assignment_has_its_parameters(pos: str, expected: int) -> None:
    with torch.device("meta"):
        model = build_model(compose(["model=cs224n", f"pos={pos}"]), vocab_size=256)
    assert count_parameters(model)[0] == expected


def item(answer: str, said: str, group: str = "known") -> dict[str, Any]:
    correct = answer == said
    return {"question": answer, "answer": answer, "said": said, "correct": correct, "group": group,
            "log_p_said": math.log(0.5), "log_p_true": -2.0}  # fmt: skip


def test_a_group_is_described_beside_the_commonest_answer() -> None:
    items = [item("Rome", "Rome"), item("Rome", "Oslo"), item("Oslo", "Oslo"), item("Bern", "Oslo")]
    found = described(items, commonest="Rome")
    assert (found["questions"], found["correct"], found["accuracy"]) == (4, 2, 0.5)
    assert found["baseline"] == 0.5
    assert found["confidence"] == pytest.approx(0.5)
    assert found["nats_true"] == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("correct", "low", "high"), [(10, 1.1, 3.6), (25, 3.4, 7.3), (44, 6.6, 11.6), (72, 11.6, 17.8)]
)
def test_wilsons_interval_of_published_results(correct: int, low: float, high: float) -> None:
    """Of 500 questions: without pretraining, London for all, Perceiver, learned positions."""
    found = [100 * end for end in wilson(correct, 500)]
    assert found == pytest.approx([low, high], abs=0.06)


def test_the_sign_test_is_of_questions_that_one_run_alone_answers() -> None:
    names = "abcdefgh"
    mine = [item(name, name) for name in names[:7]] + [item("h", "x")]
    theirs = [item("a", "a")] + [item(name, "x") for name in names[1:7]] + [item("h", "x")]
    assert sign_test(mine, theirs) == {"only_this": 6, "only_the_other": 0, "p": 2 / 2**6}
    assert sign_test(mine, mine)["p"] == 1
    with pytest.raises(ValueError, match="different questions"):
        sign_test(mine, theirs[:-1])


def test_answers_are_written_shown_and_reported(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [f"run={runs}/after,{runs}/alone", "eval=answers", f"reference={runs}/alone", "longest=4"]
    assert evaluate([*ask, "dtype=float32", "threads=1"]) == 0
    out = capsys.readouterr().out
    for words in ("weights=given", "known", "stranger", "weights: fresh"):
        assert words in out
    answer = json.loads((runs / "after/eval/answers.json").read_text())
    assert [answer["groups"][g]["questions"] for g in ("known", "stranger")] == [6, 6]
    assert len(answer["items"]) == 12
    asked = answered_by(opened(runs / "after")).val
    assert len({i["question"] for i in answer["items"]}) == len(asked)
    assert answer["reference"]["run"] == f"{runs}/alone"
    write([runs / "after", runs / "alone"])
    page = (runs / "after/report.md").read_text()
    assert "### Answers to questions" in page
    assert "### Answers: what the choices change" in page
    assert (runs / "after/figures/answers.svg").exists()
    assert "convert" not in page


def test_answers_in_a_sentence() -> None:
    """What is significant, one by one while it is little; else between which points."""
    far = correct([paired([0.48, 0.50, 0.52])])[0]
    near = correct([paired([-0.10, 0.12, -0.01])])[0]
    assert in_a_sentence({"4 pairs": near, "8 pairs": far}) == (
        "+50.0 (+45.0 to +55.0) points at 8 pairs; no significant difference at 4 pairs"
    )
    assert in_a_sentence({"4 pairs": near}) == "without a significant difference at 4 pairs"
    lower = correct([paired([-0.19, -0.20, -0.21])])[0]
    many = {f"{n} pairs": d for n, d in enumerate([near, far, lower, far, far, far])}
    assert (
        in_a_sentence(many)
        == "between -20.0 and +50.0 points, significant at 5 of 6 kinds of questions"
    )
    flat = {f"{n} pairs": near for n in range(5)}
    assert in_a_sentence(flat) == "without a significant difference at any of 5 kinds"
    assert in_a_sentence(flat | {"9 pairs": far}) == (
        "+50.0 (+45.0 to +55.0) points at 9 pairs; no significant difference at the other 5 kinds"
    )
    alone = paired([0.125])
    assert in_a_sentence({"names": alone}) == (
        "+12.5 points at names (one seed: significance unknown)"
    )


def test_other_objectives_have_no_answers(runs: Path) -> None:
    with pytest.raises(
        ValueError, match="trained with objective=infill; it needs objective=answers"
    ):
        evaluate([f"run={runs}/told", "eval=answers", "threads=1"])


#: A tiny run, of recall at two levels of difficulty.
RECALL = [
    *TINY,
    "data=recall",
    "dtype=float32",
    "data.rows=40",
    "data.val_rows=6",
    "data.length=16",
    "data.levels=[1,2]",
    "data.val_levels=[1,3]",
    "model.max_len=16",
]


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("probe")
    where = [f"data.cache={folder}/cache", f"out={folder}/run"]
    assert run_training(compose([*RECALL, *where])) == 0
    return folder / "run"


def test_a_sweep_evaluates_its_runs_and_reports_on_that(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = "report.evaluate=['eval=answers','eval=rank']"
    where = [f"data.cache={tmp_path}/cache", f"out={tmp_path}/sweep"]
    assert train(["-m", *RECALL, *where, "attn=mha,mqa", "seed=0,1", lines]) == 1
    said = capfd.readouterr()
    assert "(4 runs, 0 failed, 1 of 2 evaluations failed)" in said.out
    assert re.search(r"training steps took \d+% of \d+ (s|min)", said.err)
    runs = [*(tmp_path / "sweep").glob("attn-*")]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs]
    seconds = [found["warmup_seconds"] + found["train_seconds"] for found in summaries]
    cells = cast(list[Cell], [SimpleNamespace(folder=run) for run in runs])
    assert min(seconds) > 0
    say_share(cells, 2, wall=sum(seconds))
    assert "training steps took 50% of" in capfd.readouterr().err
    for run in (tmp_path / "sweep").glob("attn-*"):
        answer = json.loads((run / "eval/answers.json").read_text())
        assert [*answer["groups"]] == ["1 pair", "3 pairs"]
    page = (tmp_path / "sweep/report.md").read_text()
    assert "- **mqa** vs. **mha**: exact match " in page.split("## Table")[0]
    assert "figures/answers.svg" in page
    assert "| 3 pairs" in page
    for figure in ("answers", "answers_differences"):
        drawn = (tmp_path / f"sweep/figures/{figure}.svg").read_text()
        assert ">pairs</text>" in drawn
        assert "mqa" in drawn
    assert not [*(tmp_path / "sweep").glob("*/eval/rank.json")]  # it needs tune=dylora, hence the 1


def test_an_answer_within_a_text_is_what_greedy_generation_says(probed: Path) -> None:
    run = opened(probed)
    objective = answered_by(run)
    assert isinstance(objective, Probe)
    items = list(items_within(run, objective, 5))
    places = [(row.tokens, answer) for row in objective.val for answer in row.answers]
    assert len(items) == len(places) == 6 + 18
    assert [item["group"] for item in items] == ["1 pair"] * 6 + ["3 pairs"] * 18
    for item, (tokens, answer) in zip(items, places, strict=True):
        sampler = Sampler(temperature=0)
        ((token,),) = generate(run.model, tokens[: answer.start], 1, sampler=sampler, seed=0)
        assert item["said"] == text_of(run, [token])
        assert item["correct"] == (item["said"] == item["answer"])
    nats = [-item["log_p_true"] for item in items if item["group"] == "1 pair"]  # 3 is not trained
    summary = json.loads((probed / "summary.json").read_text())
    assert sum(nats) / len(nats) == pytest.approx(summary["val_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("['eval=answer']", "eval=answer: no such choice"),
        ("['eval=length contxt=1']", "contxt: no such key"),
        ("['eval=length contexts=oh']", "contexts=oh is not a list"),
        ('["eval=\'answers"]', "No closing quotation"),
        ("eval", "report.evaluate=eval is not a list"),
    ],
)
def test_an_evaluation_that_cannot_be_stops_a_sweep_before_it_starts(
    lines: str, message: str, tmp_path: Path
) -> None:
    ask = ["-m", *RECALL, f"data.cache={tmp_path}/cache", f"out={tmp_path}/sweep", "seed=0,1"]
    with pytest.raises(ValueError, match=message):
        train([*ask, f"report.evaluate={lines}"])
    assert not [*(tmp_path / "sweep").glob("seed*")]


def test_a_signal_ends_the_evaluation_of_a_sweep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eval.py").write_text(
        f"import pathlib, os, time\npathlib.Path('{tmp_path}/pid').write_text(str(os.getpid()))\ntime.sleep(999)"
    )
    monkeypatch.setattr("train.sweep.evaluations.EVAL", tmp_path / "eval.py")

    def stop() -> None:
        assert eventually(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop).start()
    with pytest.raises(Stop):
        evaluations.evaluate(tmp_path, ["eval=answers"])
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_was_evaluated_so_is_not_evaluated_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = tmp_path / "run/eval/answers.json"
    answer.parent.mkdir(parents=True)
    summary = tmp_path / "run/summary.json"
    summary.write_text("1")
    (tmp_path / "eval.py").write_text(
        f"import pathlib, sys\n"
        f"pathlib.Path('{tmp_path}/calls').open('a').write('.')\n"
        f"pathlib.Path('{answer}').write_text(sys.argv[2])\n"
        f"sys.exit(sys.argv[2] == 'eval=fails')"
    )
    monkeypatch.setattr("train.sweep.evaluations.EVAL", tmp_path / "eval.py")

    def calls(*lines: str) -> int:
        before = len(calls_made.read_text()) if calls_made.exists() else 0
        evaluations.evaluate(tmp_path, [*lines])
        return len(calls_made.read_text()) - before

    calls_made = tmp_path / "calls"
    assert [calls("eval=answers"), calls("eval=answers")] == [1, 0]
    assert [calls("eval=answers n=2"), calls("eval=answers n=2")] == [1, 0]
    summary.write_text("2")  # the run was trained again
    assert [calls("eval=answers n=2"), calls("eval=answers n=2")] == [1, 0]
    answer.write_text("of another evaluation")
    assert [calls("eval=answers n=2"), calls("eval=answers n=2")] == [1, 0]
    assert [calls("eval=fails"), calls("eval=fails")] == [1, 1]


def test_levels_of_difficulty_are_an_axis() -> None:
    assert levels_of(["1 pair", "4 pairs"]) == (["1", "4"], "pairs")
    assert levels_of(["0-7 characters back", "8-15 characters back"]) == (
        ["0-7", "8-15"],
        "characters back",
    )
    assert levels_of(["known", "stranger"]) is None
    assert levels_of(["1st pair", "2nd pair"]) is None
    assert levels_of(["4 pairs"]) is None
    assert levels_of(["4 pairs", "4 hops"]) is None


def test_levels_are_in_the_order_of_their_numbers_and_other_groups_in_their_own() -> None:
    def study(*groups: str) -> Study:
        variant = SimpleNamespace(answers=lambda _: [{"groups": dict.fromkeys(groups)}])
        return cast(Study, SimpleNamespace(variants=[variant]))

    shown = groups_of(study("16-23 characters back", "8-15 characters back"))
    assert shown == ["8-15 characters back", "16-23 characters back"]
    assert groups_of(study("stranger", "known")) == ["stranger", "known"]
