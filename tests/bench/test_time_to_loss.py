"""Steps and time to a validation loss."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import time_to_loss
from bench.time_to_loss import main
from train.config.schema import Config
from train.run import run_training


def made(folder: Path, name: str | None, *losses: float) -> str:
    """A run with steps of two seconds and a validation every ten steps."""
    folder.mkdir()
    choices = {"attn": "mha", "pos": "rope", "model": "nano"}
    (folder / "config.json").write_text(json.dumps({"name": name, "choices": choices}))
    lines = [
        {"step": 10 * i, "split": "val", "seconds": 20 * i, "loss": loss}
        for i, loss in enumerate(losses, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_the_first_validation_at_a_loss_is_reported_for_each_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    slow = made(tmp_path / "slow", "recipe", 2.0, 1.6, 1.5, 1.55)
    fast = made(tmp_path / "fast", None, 1.7, 1.4)
    assert main([f"run={slow},{fast}", "loss=1.65"]) == 0
    head, first, second, *_ = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[5:] == ["to", "1.5000", "time", "to", "1.6500", "time"]
    assert first == ["slow", "40", "1.5000", "30", "30", "60", "s", "20", "40", "s"]
    assert second == ["fast", "20", "1.4000", "20", "20", "40", "s", "20", "40", "s"]
    picture = (tmp_path / "outputs/time_to_loss.svg").read_text()
    assert "recipe" in picture
    assert "fast" in picture
    assert main([f"run={slow}", "loss=1.2"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["-", "-"]


def test_runs_can_be_retimed_on_this_machine(
    config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours = ("attn=mha", "attn=gqa", "attn=mha", "data.tokenizer=byte")
    for seed, variant in enumerate(ours):
        overrides = [variant, "steps=2", "eval_every=1", f"seed={seed}"]
        assert run_training(config(*overrides, f"out={tmp_path}/{seed}")) == 0
    monkeypatch.chdir(tmp_path)
    turns: list[object] = []

    def interleave(
        steps: dict[str, object], device: object, warm_caches: bool
    ) -> dict[str, list[float]]:
        turns.extend(steps)
        return {recipe: [3.0, 4.0 if "MHA" in recipe else 70.0, 500.0] for recipe in steps}

    monkeypatch.setattr(time_to_loss, "interleave", interleave)
    capsys.readouterr()
    assert main(["run=0,1,2,3", "loss=100", "retime=true"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(turns) == 3  # a recipe is timed once for each vocabulary, whatever its seeds
    assert said[0].startswith("a step of 0, 2: 4,000 ms (3,500 to 252,000)")
    assert [line.split()[-3:] for line in said[5:9]] == [
        ["1", "4", "s"],
        ["1", "70", "s"],
        ["1", "4", "s"],
        ["1", "4", "s"],
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run=nowhere"], "nowhere is not a run"),
        (["loss=1"], "run=DIR,DIR"),
        (["run={slow}", "retime=yes"], "retime=yes: no such choice"),
        (["run={slow}", "loss=low"], "loss=low is not a finite number"),
        (["run={slow}", "loss=nan"], "loss=nan is not a finite number"),
        (["run={empty}"], "has no validation yet"),
    ],
)
def test_wrong_arguments_are_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    places = {"slow": made(tmp_path / "slow", None, 2.0), "empty": made(tmp_path / "empty", None)}
    with pytest.raises(ValueError, match=message):
        main([argument.format(**places) for argument in arguments])
