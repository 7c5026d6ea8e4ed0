"""The table of config keys."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from compare.report.variants import flatten
from train.config.compose import compose
from train.config.keys import HELD, KEYS, MISSING, named, select
from train.config.options import Settings
from train.config.schema import Config
from train.run import run_training

DEFAULT = compose([])


def test_every_key_of_train_yaml_has_a_row_and_every_row_a_key() -> None:
    assert KEYS.keys() == DEFAULT.keys() | {"matched"}  # which match= adds
    assert KEYS.keys() >= {field.name for field in fields(Settings)}


def test_rows_name_keys_that_exist() -> None:
    flat = DEFAULT["choices"] | dict(flatten(DEFAULT))
    assert flat.keys() >= set(HELD)
    assert flat.keys() >= {key.only_with for key in KEYS.values()} - {""}
    assert {name: type(value) for name, value in MISSING.items()} == {
        name: type(DEFAULT[name]) for name in MISSING
    }


def test_only_what_tells_variants_apart_takes_time_or_may_be_lossless() -> None:
    variants = set(named(lambda key: key.role == "variant"))
    assert variants >= set(named(lambda key: key.step_time or key.lossless or key.held))


def test_a_key_without_effect_is_not_selected() -> None:
    assert select({"convert": "first", "init_from": None}, ["convert"]) == {}
    assert select({"convert": "first", "init_from": "x"}, ["convert"]) == {"convert": "first"}
    assert select({"data": {"cache": "x", "path": "y"}}, ["data", "seed"]) == {
        "data": {"path": "y"}
    }


@pytest.mark.parametrize(
    "changes",
    [
        "eval_every=3 eval_batch_size=3 save_every=5 keep=1 sample.tokens=3 force=true convert=first "
        "name=other match=params baseline=attn=mha",
        "memory=lean",
    ],
)
def test_what_is_no_part_of_a_result_changes_none(
    changes: str, config: Callable[..., Config], tmp_path: Path
) -> None:
    """A row that says so is right: the key changes no loss of a run."""
    for change in changes.split():
        key = KEYS[change.split("=")[0].split(".")[0]]
        assert key.role == "record" or key.lossless or key.only_with
    results = []
    for name, more in (("one", []), ("two", changes.split())):
        assert run_training(config("dtype=float32", *more, f"out={tmp_path}/{name}")) == 0
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        losses = [line["loss"] for line in lines if line["split"] == "train"]
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        results.append((losses, pytest.approx(summary["val_loss"], rel=1e-6)))
    assert results[0] == results[1]
