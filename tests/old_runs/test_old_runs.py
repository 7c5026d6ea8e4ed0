"""Runs made at commit 09e9bca, before files and keys were renamed, still give what they gave then."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.evaluate import evaluate
from cli.sample import sample
from compare.report.analysis import analyse_folders
from compare.report.write import write
from train.config.compose import compose
from train.config.old_spellings import current_overrides
from train.config.options import SweepOptions
from train.record.run_log import records
from train.record.terminal import table
from train.run import run_training
from train.sweep.run import sweep

OLD = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((OLD / "expected.json").read_text())
WINDOWS = {"attn.window=8": "attn.window=5", "attn.local.window=6": "attn.local.window=4"}
each = pytest.mark.parametrize("name", EXPECTED)


def command_of(name: str) -> list[str]:
    """The overrides of an old run, in the spelling of then."""
    environment = json.loads((OLD / name / "environment.json").read_text())
    return list(environment["command"][1:])


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of an old run, to work in."""

    def copy(name: str) -> Path:
        folder = shutil.copytree(OLD / name, tmp_path / name)
        config = (folder / "config.json").read_text()
        (folder / "config.json").write_text(
            config.replace("tests/old_runs/.cache", f"{tmp_path}/c")
        )
        return folder

    return copy


@each
def test_it_is_evaluated_to_the_same_numbers(name: str, run: Callable[[str], Path]) -> None:
    folder, expected = run(name), EXPECTED[name]
    assert evaluate([f"run={folder}", "threads=1"]) == 0
    (path,) = (folder / "eval").glob("val_*.json")
    found = json.loads(path.read_text())
    assert found["tokens"] == expected["perplexity"]["tokens"]
    for key in ("nats", "perplexity", "bits_per_byte"):
        assert found[key] == pytest.approx(expected["perplexity"][key], rel=1e-5)
    asked = ["eval=length", "contexts=[1,2]", "scalings=[rope_linear]"]
    assert evaluate([f"run={folder}", "threads=1", *asked]) == 0
    rows = json.loads((folder / "eval/length.json").read_text())["rows"]
    found = {(row["pos"], row["context"]): row["loss"] for row in rows}
    for row in expected["length"]:
        loss = row["loss"]  # None where the positions end before
        near = None if loss is None else pytest.approx(loss, rel=1e-5)
        assert found[row["pos"], row["context"]] == near


@each
def test_its_heads_look_where_they_looked(name: str, run: Callable[[str], Path]) -> None:
    folder, expected = run(name), EXPECTED[name]
    assert evaluate([f"run={folder}", "threads=1", "eval=attention"]) == 0
    found = json.loads((folder / "eval/attention.json").read_text())
    assert found["repeated_tokens"] == pytest.approx(expected["attention"], rel=1e-5)
    for layer, distance in zip(found["layers"], expected["distance"], strict=True):
        assert layer["distance"] == pytest.approx(distance, rel=1e-4)


@each
def test_it_is_resumed_and_goes_on_as_it_would_have(
    name: str, run: Callable[[str], Path], tmp_path: Path
) -> None:
    """The overrides are those of its own command line, in the spelling of then.

    Only windows are rewritten: they counted both sides of a token, which a number does not tell.
    """
    folder = run(name)
    kept = [o for o in command_of(name) if not o.startswith(("out=", "steps=", "data.cache="))]
    kept = current_overrides("train", [WINDOWS.get(o, o) for o in kept])
    more = [f"out={folder}", "steps=6", "resume=true", f"data.cache={tmp_path}/cache"]
    assert run_training(compose([*kept, *more])) == 0
    losses = [r["loss"] for r in records(folder / "metrics.jsonl") if r["split"] == "train"]
    assert losses == pytest.approx(EXPECTED[name]["resumed"], rel=1e-4)


@each
def test_it_writes_the_same_text(
    name: str, run: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample([f"run={run(name)}", "max_new_tokens=12", "seed=3", "threads=1"]) == 0
    assert capsys.readouterr().out == EXPECTED[name]["sample"]


def test_what_is_done_is_told_again() -> None:
    """A summary of then has fewer numbers than one of now."""
    summary = json.loads((OLD / "gqa/summary.json").read_text())
    assert "above the entropy" not in table(summary)
    assert f"{summary['params']:,}" in table(summary)


def test_it_gives_its_weights_to_new_runs(tmp_path: Path) -> None:
    kept = [o for o in command_of("gqa") if not o.startswith(("out=", "data.cache="))]
    assert (
        run_training(compose([*kept, f"out={tmp_path}/run", f"data.cache={tmp_path}/cache"])) == 0
    )
    losses = [r["loss"] for r in records(tmp_path / "run/metrics.jsonl") if r["split"] == "train"]
    assert losses == pytest.approx(EXPECTED["gqa"]["train"], rel=1e-4)


@pytest.fixture
def sweep_folder(run: Callable[[str], Path]) -> Callable[..., Path]:
    """A sweep of old runs by stage, with the sweep.json of then; `asked` are those it lists."""

    def make(*stages: str, asked: tuple[str, ...]) -> Path:
        cells = []
        for name, before in zip(stages, (None, *stages), strict=False):
            path = run(name) / "config.json"
            config = json.loads(path.read_text())
            cells.append({"name": name, "parent": before, "config": config | {"init_from": None}})
            origin = str(path.parents[1] / before) if before else None
            path.write_text(json.dumps(config | {"init_from": origin}))
        content = {
            "cells": [cell for cell in cells if cell["name"] in asked],
            "known": [{"identity": f"hash {name}", "name": name} for name in stages],
        }
        folder = path.parents[1]
        (folder / "sweep.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.mark.parametrize("asked", [("mha", "gqa"), ("gqa",), ()])
def test_a_sweep_of_then_has_nothing_left_to_train(
    asked: tuple[str, ...], sweep_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its runs are known by their configs, parents included: hashes of then are those of no run now."""
    folder = sweep_folder("mha", "gqa", asked=asked)
    monkeypatch.setattr("train.sweep.run.launch_here", lambda *_: pytest.fail("a run is trained"))
    same = [o for o in command_of("gqa") if not o.startswith(("out=", "attn", "init_from="))]
    cells = [[*same, f"out={folder}", "stages=['attn=mha','attn=gqa attn.n_kv_heads=2']"]]
    options = SweepOptions(jobs=1, retry=False, seeds=None, margin=0.01)
    for _ in range(2):  # the second time by the sweep.json of now
        assert sweep(cells, options, [], pytest.fail, str, pytest.fail) == 0
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {"mha", "gqa"}


def test_old_and_new_are_reported_together(tmp_path: Path) -> None:
    folder = shutil.copytree(OLD, tmp_path / "sweep")
    write([folder], "attn=mha pos=learned")
    results = json.loads((folder / "results.json").read_text())
    assert {v["label"]: v["runs"] for v in results["variants"]} == {
        "mha learned": ["mha"],
        "gqa learned": ["gqa"],
        "mla alibi": ["mla"],
        "pattern t5": ["pattern"],
        "mha rope": ["qk_norm"],
        "sliding rope": ["window"],
    }
    assert analyse_folders([folder], "attn=qk_norm pos=rope").baseline.label == "mha rope"
    lines = (folder / "results.csv").read_text().splitlines()
    column = lines[0].split(",").index("val_perplexity")
    values = sorted(float(line.split(",")[column]) for line in lines[1:])
    told = sorted(expected["perplexity"]["perplexity"] for expected in EXPECTED.values())
    assert values == pytest.approx(told, rel=1e-5)
