"""A judge answers in one line, from what is there, and says no more than it knows."""

import json
import math
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from tiny import HANG, RUN, eventually

from cli.judge import main
from compare.judge import rounds
from compare.judge.answer import factor, relative
from compare.judge.ledger import Ledger
from compare.judge.limit import limited
from compare.statistics.online import level_of
from compare.statistics.paired import paired
from data.atomic import write_json
from train.config.compose import compose
from train.record.run_log import records
from train.sweep.processes import Ended, folder_of, signals
from train.sweep.run import locked
from train.sweep.slots import Slot

ROOT = Path(__file__).resolve().parents[2]
Losses = dict[tuple[str, int], float | str]  # of a variant and a seed; a text is why it failed


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> list[str]:
    return [*RUN, "model.n_layers=1", f"data.path={text}", f"data.cache={tmp_path}/cache"]


@pytest.fixture
def losses() -> Losses:
    """What the runs of a made-up sweep come to; 3 for a run that is not named."""
    return {}


@pytest.fixture
def made(losses: Losses, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The runs that are made, in order: a sweep whose processes only leave what a run leaves."""
    trained: list[str] = []

    def launch(runs: list[list[str]], slots: list[Slot], ended: Ended, start: object) -> None:
        for run in runs:
            config, folder = compose(run), folder_of(run)
            finish(folder, config, losses.get((config["choices"]["attn"], config["seed"]), 3.0))
            trained.append(folder.name)
            ended(folder)

    monkeypatch.setattr("train.sweep.run.launch_here", launch)
    monkeypatch.setattr("train.sweep.run.starting", lambda *_: nullcontext())
    monkeypatch.setattr(rounds, "forecast", lambda runs, jobs: {name: 1.0 for name, _ in runs})
    return trained


def finish(folder: Path, config: dict[str, Any], loss: float | str) -> None:
    """The folder of a run that ended with this loss, or failed."""
    folder.mkdir()
    write_json(folder / "config.json", config | {"out": None})
    if isinstance(loss, str):
        write_json(folder / "status.json", {"state": "failed", "reason": loss, "last_step": 1})
        return
    steps = config["steps"]
    summary = {"seed": config["seed"], "val_loss": loss + steps**-0.5 + 1e-4 * (config["seed"] * steps % 7), "steps": steps, "tokens": 100 * steps,
               "flops_per_token": 10, "step_ms": 20.0 if config["choices"]["attn"] == "gqa" else 10.0,
               "data_fingerprint": "a", "tokenizer_sha256": "b", "wall_seconds": 50.0, "device": "cpu"}  # fmt: skip
    write_json(folder / "summary.json", summary)
    write_json(folder / "status.json", {"state": "done", "reason": None, "last_step": steps})


@pytest.fixture
def judge(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., dict[str, Any]]:
    """Asks for a verdict on an attention, and reads the one line."""

    def judged(new: str, *more: str, minutes: float = 60) -> dict[str, Any]:
        asked = [
            "base=attn=mha",
            f"new={new}",
            f"minutes={minutes}",
            f"to={tmp_path}/judge",
            *tiny,
            *more,
        ]
        assert main(asked) == 0
        (line,) = capsys.readouterr().out.splitlines()
        found = json.loads(line)
        assert isinstance(found, dict)
        return found

    return judged


def plant(losses: Losses, attn: str, *effects: float) -> None:
    """Losses of a variant that is so much worse than the base, seed by seed."""
    for seed, effect in enumerate(effects):
        losses["mha", seed] = 3 + 0.1 * seed
        losses[attn, seed] = 3 + 0.1 * seed + effect


def test_what_is_better_is_kept(made: list[str], losses: Losses, judge: Callable[..., Any]) -> None:
    plant(losses, "gqa", -0.1, -0.1001, -0.0999)
    found = judge("attn=gqa")
    assert (found["verdict"], found["reason"], found["seeds"]) == ("keep", "better", 3)
    assert found["difference"] == pytest.approx(-0.0952, abs=1e-4)
    assert found["interval"][0] < found["difference"] < found["interval"][1] < 0
    assert found["step_time"] == pytest.approx(2.0)
    assert (found["worth"], found["metric"]) == (None, "perplexity")
    assert len(made) == 6


@pytest.mark.parametrize(
    ("effects", "reason"),
    [((0.1, 0.1001, 0.0999), "worse"), ((0.0001, -0.0001, 0.0), "equal")],
)
def test_what_is_no_better_is_discarded(
    effects: tuple[float, ...], reason: str,
    made: list[str], losses: Losses, judge: Callable[..., Any],
) -> None:  # fmt: skip
    plant(losses, "gqa", *effects)
    found = judge("attn=gqa")
    assert (found["verdict"], found["reason"]) == ("discard", reason)


def test_a_difference_beyond_any_number_is_null() -> None:
    """A rate far too high may leave finite losses whose interval no number holds."""
    found = relative(paired([150.0, 20.0]))
    assert found["difference"] == pytest.approx(math.expm1(85))
    assert found["interval"] == [pytest.approx(-1.0), None]
    assert json.loads(json.dumps(factor(paired([750.0, 710.0]))))["factor"] is None


def test_a_base_without_a_finite_loss_is_not_charged_to_the_candidate(
    made: list[str], losses: Losses, tiny: list[str], tmp_path: Path
) -> None:
    losses["mha", 0] = 1e4
    with pytest.raises(ValueError, match="a run of the base has no finite loss"):
        main(["base=attn=mha", "new=attn=gqa", "minutes=60", f"to={tmp_path}/judge", *tiny])


def test_a_later_loser_costs_one_run(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    """The noise of the first candidate, with five seeds, tells that of the second; the base is there."""
    plant(losses, "gqa", 0.02, -0.02, 0.02, -0.02, 0.05)
    losses["mqa", 0] = 3.2
    assert judge("attn=gqa", "margin=1e-6")["seeds"] >= 5
    before = len(made)
    found = judge("attn=mqa")
    assert (found["verdict"], found["reason"], found["seeds"]) == ("discard", "hopeless", 1)
    assert (found["number"], found["interval"]) == (2, None)
    assert made[before:] == ["attn-mqa"]


def test_without_time_nothing_is_decided_and_the_same_command_goes_on(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    """Each run took 50 seconds and some more: two runs fit, as none is known to take long; two more do not."""
    plant(losses, "gqa", -0.1, -0.1001, -0.0999)
    found = judge("attn=gqa", minutes=1)
    assert (found["verdict"], found["seeds"]) == ("undecided", 1)
    assert 2 * 50 / 60 <= found["minutes_needed"] <= 2.5
    again = judge("attn=gqa")
    assert (again["verdict"], again["seeds"]) == ("keep", 3)
    assert (again["number"], again["level"]) == (1, found["level"])
    assert len(made) == len(set(made)) == 6


def test_what_is_decided_is_only_said_again(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    plant(losses, "gqa", -0.1, -0.1001, -0.0999)
    found, before = judge("attn=gqa"), len(made)
    assert judge("attn=gqa attn.n_kv_heads=2") == found  # the default, spelt out
    assert len(made) == before


def test_a_candidate_that_fails_is_discarded_with_the_reason(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    losses["gqa", 0] = "diverged at step 7"
    found = judge("attn=gqa")
    assert (found["verdict"], found["failed"], found["difference"]) == ("discard", True, None)
    assert "diverged at step 7" in found["reason"]


def test_a_base_that_fails_is_no_verdict(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    losses["mha", 0] = "out of memory"
    with pytest.raises(ValueError, match="the base failed, .* out of memory"):
        judge("attn=gqa")


def test_the_levels_of_the_ledger_follow_its_order_and_what_was_kept(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    plant(losses, "gqa", -0.1, -0.1001, -0.0999)
    plant(losses, "mqa", 0.1, 0.1001, 0.0999)
    assert judge("attn=mqa")["level"] == level_of(1, [])
    assert judge("attn=gqa")["level"] == level_of(2, [])
    assert judge("attn=gated")["level"] == level_of(3, [2]) > level_of(3, [])


def test_a_ledger_outlives_a_line_that_was_cut_off(tmp_path: Path) -> None:
    first = Ledger(tmp_path).entry("a", "b")
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"number": 2, "ba')
    second = Ledger(tmp_path).entry("a", "c")
    assert (first.number, second.number) == (1, 2)
    assert list(Ledger(tmp_path).entries.values()) == [first, second]
    (tmp_path / "ledger.jsonl").write_text("[]\n")
    with pytest.raises(ValueError, match=r"ledger.jsonl, line 1: '\[\]' is not an entry"):
        Ledger(tmp_path)


def test_worth_needs_three_numbers_of_steps_of_the_base(
    made: list[str], losses: Losses, judge: Callable[..., Any]
) -> None:
    """They are there once other numbers of steps were candidates, with two seeds at least."""
    plant(losses, "gqa", -0.01, -0.0101, -0.0099)
    assert judge("attn=gqa")["worth"] is None
    for steps in (24, 48):
        judge(f"steps={steps}")
    plant(losses, "mqa", -0.01, -0.0101, -0.0099)
    found = judge("attn=mqa")["worth"]
    assert found["refused"] is None
    low, high = found["compute"]["interval"]
    assert 1 < low < found["compute"]["factor"] < high


def test_a_limit_stops_what_can_be_stopped_and_nothing_else() -> None:
    with limited(0.05) as limit:
        assert eventually(limit.stopped.is_set)
        with signals() as caught:
            assert eventually(lambda: caught)
        assert caught == [signal.SIGTERM]
        assert limit.left == 0.0
    with pytest.raises(SystemExit, match="143"), limited(HANG):
        signal.raise_signal(signal.SIGTERM)


def test_a_real_change_is_judged(
    tiny: list[str], tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without learning every seed is worse; the runs are trained in this process."""
    asked = ["base=attn=mha", "new=optim.lr=1e-9", "minutes=60", f"to={tmp_path}/judge", *tiny]
    assert main([*asked, "steps=40", "optim.schedule=constant"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert (found["verdict"], found["reason"], found["seeds"]) == ("discard", "worse", 3)
    assert found["difference"] > 0
    assert found["step_time"] > 0


def test_an_interrupted_judge_says_nothing_and_keeps_its_runs(
    tiny: list[str], tmp_path: Path
) -> None:
    asked = ["base=attn=mha", "new=attn=gqa", "minutes=1e5", f"to={tmp_path}/judge", *tiny]
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.judge", *asked, "steps=1e6"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    run = tmp_path / "judge/runs/attn-mha"
    try:
        assert eventually(lambda: list(records(run / "metrics.jsonl")))
        process.terminate()
        out, _ = process.communicate(timeout=HANG)
    finally:
        process.kill()
    assert (process.returncode, out) == (143, "")
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    (entry,) = Ledger(tmp_path / "judge").entries.values()
    assert entry.verdict == "undecided"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["new=attn=gqa", "minutes=1"], "base=... is missing"),
        (["base=attn=mha", "new=attn=gqa", "minutes=soon"], "minutes=soon must be a number above 0"),
        (["base=attn=mha", "new=attn=nothing", "minutes=1"], "attn=nothing"),
        (["base=attn=mha", "new=attn=gqa seed=1", "minutes=1"], "new: seed is not for a variant"),
        (["base=attn=mha", "new=attn=mha", "minutes=1"], "base and new are the same variant"),
        (["base=attn=mha", "new=experiment=grid", "minutes=1"], "a variant is one run"),
        (["base=attn=mha", "new=attn=gqa steps=0", "minutes=1"], "new: steps=0 trains nothing"),
        (["base=attn=mha", "new=attn=gqa,mqa", "minutes=1"], "several values need -m"),
        (["base=attn=mha", "new=attn=gqa", "minutes=1", "margin=2"], "margin=2 must be above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_written(
    arguments: list[str], message: str, made: list[str], tiny: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        main([*arguments, *tiny, f"to={tmp_path}/judge"])
    assert made == []
    assert not (tmp_path / "judge").exists()


def test_two_judges_do_not_share_a_folder(made: list[str], tiny: list[str], tmp_path: Path) -> None:
    lock = locked(tmp_path)
    with pytest.raises(ValueError, match="is in use by another"):
        main(["base=attn=mha", "new=attn=gqa", "minutes=1", *tiny, f"to={tmp_path}"])
    lock.release()


def test_what_is_timed_apart_from_the_process_can_be_sent_there(
    made: list[str], judge: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with GPUs, where what may start CUDA is pickled."""
    sent: list[str] = []

    @contextmanager
    def apart(gpus: bool) -> Iterator[Callable[..., Any]]:
        def ask(function: Callable[..., Any], *values: Any, **named: Any) -> Any:
            sent.append(function.__name__)
            pickle.dumps((function, values, named))
            return function(*values, **named)

        yield ask

    monkeypatch.setattr("train.sweep.run.apart", apart)
    monkeypatch.setattr(rounds, "forecast", timed)
    assert judge("attn=gqa")["verdict"] == "discard"
    assert {"plan_cells", "timed"} <= set(sent)


def timed(runs: list[Any], jobs: int) -> dict[str, float]:
    return {name: 1.0 for name, _ in runs}
