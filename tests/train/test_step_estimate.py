"""Estimates of a step's time, and the steps that fit in a run's minutes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cli.train import train
from compare.check.properties import VOCAB, composed
from train import step_estimate as probe
from train.config.compose import compose
from train.config.schema import Config
from train.measure import timer
from train.run import run_training
from train.step import TrainStep
from train.step_estimate import steps_of_validation, steps_within_minutes

Make = Callable[..., Config]


def test_the_estimated_step_is_that_of_the_config() -> None:
    overrides = ["optim.clip=0.5", "accumulate=2", "seed=3", "batch_size=6"]
    step = probe.random_token_step(composed("data.path=README.md", *overrides), VOCAB)
    assert (step.clip, step.accumulate, step.seed) == (0.5, 2, 3)
    assert step.batches(0)[0].shape == (6, step.model.shape.max_len)
    unclipped = composed("data.path=README.md", "optim.clip=null")
    assert probe.random_token_step(unclipped, VOCAB).clip == float("inf")


def test_a_probe_that_lasts_for_few_rows_takes_time_to_grow_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock of the test's own: a step takes 0.1 s for each row."""
    now, rows = [0.0], []

    def take(self: TrainStep, step: int) -> None:
        rows.append(len(self.batches(step)[0]))
        now[0] += 0.1 * rows[-1]

    monkeypatch.setattr(TrainStep, "__call__", take)
    for module in (probe, timer):
        monkeypatch.setattr(module, "perf_counter", lambda: now[0])
    for batch_size, expected in ((4, 0.4), (64, 6.4)):
        asked = composed("data.path=README.md", f"batch_size={batch_size}")
        assert probe.step_seconds(asked, VOCAB) == pytest.approx(expected)
        assert max(rows) <= batch_size
    assert max(rows) < 64
    asked = composed("data.path=README.md", "batch_size=4", "accumulate=2")
    assert probe.step_seconds(asked, VOCAB) == pytest.approx(0.4)
    assert probe.step_seconds(composed("data.path=README.md", "compile=true"), VOCAB) is None


def step_takes(monkeypatch: pytest.MonkeyPatch, seconds: float | None) -> None:
    monkeypatch.setattr(probe, "step_seconds", lambda config, vocab_size: seconds)


def test_a_run_has_the_steps_that_fit_in_its_minutes(
    config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the validations: one at the end, of two steps' time."""
    monkeypatch.setattr(probe, "corpus_of", lambda config: (VOCAB, 4 * 16 * 6))
    asked = config("steps=800", "minutes=1", "eval_every=null", "batch_size=4")
    for seconds, steps in ((0.06, 800), (0.075, 790), (0.1, 590), (1.0, 50), (9.0, 10), (99.0, 10)):
        step_takes(monkeypatch, seconds)
        assert steps_within_minutes(asked) == steps
        said = capsys.readouterr().err
        shorter = f"minutes=1: {steps} steps instead of 800; a step takes {1e3 * seconds:,.0f} ms"
        assert said.startswith(shorter if steps < 800 else "")
        assert len(said.splitlines()) == (steps < 800)
    step_takes(monkeypatch, None)
    with pytest.raises(ValueError, match="minutes=1 times a step first, which needs compile=false"):
        steps_within_minutes(asked)


def test_validations_are_counted_to_the_last_step(config: Make) -> None:
    """Each of three batches, forward alone: as long as one step."""
    tokens = 3 * 4 * 16
    for every, steps, done, times in (
        (5, 12, 0, 3), (5, 12, 5, 2), (5, 12, 11, 1), (5, 10, 0, 2), (None, 12, 0, 1), (50, 12, 3, 1)
    ):  # fmt: skip
        asked = config("batch_size=4") | {"eval_every": every, "steps": steps}
        assert steps_of_validation(asked, tokens, done) == times


def test_a_shortened_run_records_its_steps_and_keeps_them(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its schedule, its config and its summary have the steps that were chosen, and a faster hour does
    not change them: it equals a run that asked for so many."""
    step_takes(monkeypatch, 2.0)
    shortened, plain = tmp_path / "shortened", tmp_path / "plain"
    one = config("steps=40", "minutes=0.6", "data.val_fraction=0") | {"out": str(shortened)}
    two = config("steps=10", "data.val_fraction=0") | {"out": str(plain)}
    assert run_training(one) == run_training(two) == 0
    assert json.loads((shortened / "config.json").read_text())["steps"] == 10
    records = [
        [(r["step"], r["loss"], r["lr"]) for r in map(json.loads, path.read_text().splitlines())]
        for path in (shortened / "metrics.jsonl", plain / "metrics.jsonl")
    ]
    assert records[0] == records[1]
    assert len(records[0]) == 10
    step_takes(monkeypatch, 0.001)
    assert run_training(one | {"resume": True}) == 0
    assert json.loads((shortened / "summary.json").read_text())["steps"] == 10


def test_minutes_choose_no_steps_that_were_asked_for() -> None:
    with pytest.raises(ValueError, match="give steps or minutes, not both"):
        train(["data.path=README.md", "steps=40", "minutes=1"])
    for bad in ("0", "-1"):
        with pytest.raises(ValueError, match=f"minutes={bad} must be above 0"):
            train(["data.path=README.md", f"minutes={bad}"])


def test_the_runs_of_a_sweep_have_equal_steps(tmp_path: Path) -> None:
    for ask in (["attn=mha,mqa", "minutes=1"], ["minutes=1,2"]):
        with pytest.raises(ValueError, match="minutes=1 is for one run"):
            train(["-m", "data.path=README.md", *ask, f"out={tmp_path}/sweep"])
    assert not (tmp_path / "sweep").exists()


def test_make_train_asks_for_a_limit_in_minutes() -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    (command,) = [line for line in makefile.splitlines() if "train.py" in line]
    asked = compose(command.split("train.py")[1].split())
    assert (asked["choices"]["attn"], asked["choices"]["pos"]) == ("gqa", "rope")
    assert asked["minutes"] <= 2
    assert asked["steps"] == 800
