"""A run that is trained again has the losses that it had, or it is said what differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.entry import run_command
from cli.reproduce import main
from compare.check.reproduction import verdict
from train.config.schema import Config
from train.run import run_training

Make = Callable[..., Config]
Curve = dict[tuple[int, str], tuple[float, float | None]]


@pytest.fixture
def run(config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run, and code of a commit."""
    for place in ("train.run", "compare.check.reproduction"):
        monkeypatch.setattr(f"{place}.git_commit", lambda: "1a2b")
    asked = config("attn=gqa", "pos=rope", "model.dropout=0.1", f"out={tmp_path}/run")
    assert run_training(asked) == 0
    return tmp_path / "run"


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_run_is_reproduced_bit_for_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), f"to={run.parent}/again"]) == 0
    assert f"{run}: reproduced: bit for bit, in all 15 records" in capsys.readouterr().out
    assert run_command(main, [f"run={run}", f"to={run.parent}/again"]) == 2
    assert "exists; choose a new folder" in capsys.readouterr().err


def test_records_that_were_made_more_seldom_are_compared_where_both_have_them() -> None:
    often: Curve = {(step, "train"): (4.0 - step / 10, 1.0) for step in range(1, 13)}
    seldom = {at: value for at, value in often.items() if at[0] % 4 == 0}
    found = verdict(often, seldom, [])
    assert found.reproduced
    assert found.words == "bit for bit, in all 3 records that both have"
    assert not verdict(often, {(4, "train"): often[4, "train"]}, []).reproduced  # it ended there


def test_what_differs_is_said(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    at = next(i for i, line in enumerate(lines) if '"step": 7' in line)
    changed = json.loads(lines[at]) | {"loss": json.loads(lines[at])["loss"] + 1e-6}
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines[:at], json.dumps(changed), *lines[at + 1 :], ""])
    )
    assert main([f"run={run}", f"to={run.parent}/a"]) == 1
    assert (
        "not reproduced: the same machine and code, but train differs at step 7"
        in capsys.readouterr().out
    )
    edit(run / "environment.json", cpu="another")
    assert main([f"run={run}", f"to={run.parent}/b"]) == 0
    said = capsys.readouterr().out
    assert "reproduced: within the bounds for another machine or code" in said
    assert "cpu another then, " in said
    here = json.loads((run.parent / "a/environment.json").read_text())
    edit(run / "environment.json", cpu=here["cpu"], git_commit="1a2b+changes")
    monkeypatch.setattr("compare.check.reproduction.git_commit", lambda: "1a2b+changes")
    assert main([f"run={run}", f"to={run.parent}/c"]) == 0
    assert "allowed); code with changes that are not committed" in capsys.readouterr().out


def test_a_run_that_is_not_finished_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").unlink()
    assert run_command(main, [f"run={run}"]) == 2
    assert "is not a finished run" in capsys.readouterr().err
    assert run_command(main, []) == 2
    assert run_command(main, [str(run), "deterministic"]) == 2
    assert "one run at a time" in capsys.readouterr().err
    assert run_command(main, [f"run={run}", "into=x"]) == 2


@pytest.mark.parametrize(
    ("factor", "last", "well"), [(1.0005, 2.015, True), (1.002, 2.0, False), (1.0, 2.03, False)]
)
def test_the_bounds_for_another_machine(factor: float, last: float, well: bool) -> None:
    then: Curve = {(5, "train"): (4.0, 1.0), (30, "train"): (3.0, 1.0), (30, "val"): (2.0, None)}
    now: Curve = {
        (5, "train"): (4.0 * factor, 1.0),
        (30, "train"): (3.5, 1.0),
        (30, "val"): (last, None),
    }
    found = verdict(then, now, ["cpu A then, B now"])
    assert found.reproduced is well
    assert ("within" if well else "outside") in found.words
    assert not verdict(then, now, []).reproduced
