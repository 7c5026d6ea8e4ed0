"""Names of earlier versions, in saved configs and on the command line."""

from collections.abc import Callable
from typing import Any

import pytest

from train.config.compose import compose
from train.config.old_spellings import current_overrides, modernise, note
from train.setup.match import baseline_overrides, compose_matched
from train.sweep.expand import cells_of, stages_of

GROUPED = "model.attention.grouped"
WINDOW = "model.attention.sliding_window"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            {"_target_": "model.attention.qk_norm.QKNorm", "n_kv_heads": None},
            {"_target_": f"{GROUPED}.MHA", "qk_norm": True},
        ),
        (
            {"_target_": "model.attention.qk_norm.QKNorm", "n_kv_heads": 2},
            {"_target_": f"{GROUPED}.GQA", "n_kv_heads": 2, "qk_norm": True},
        ),
        ({"_target_": f"{GROUPED}.MHA"}, {"_target_": f"{GROUPED}.MHA", "qk_norm": False}),
        (
            {"_target_": f"{WINDOW}.Sliding", "window": 9, "n_kv_heads": None},
            {
                "_target_": f"{WINDOW}.SlidingWindow",
                "window": 5,
                "n_kv_heads": None,
                "qk_norm": False,
            },
        ),
        (
            {
                "order": ["a"],
                "a": {"_target_": "model.attention.sliding.Sliding", "window": None},
            },
            {
                "pattern": ["a"],
                "a": {"_target_": f"{WINDOW}.SlidingWindow", "window": None, "qk_norm": False},
            },
        ),
    ],
)
def test_a_saved_attention_means_what_it_meant(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert modernise({"attn": old})["attn"] == new
    assert modernise({"attn": new})["attn"] == new


def test_saved_keys_of_positions_have_their_new_names() -> None:
    old = {"_target_": "model.position.rope_yarn.YaRN", "fraction": 0.5, "original_len": 64}
    assert modernise({"pos": old})["pos"] == {
        "_target_": "model.position.rope_yarn.YaRN",
        "rotary_fraction": 0.5,
        "original_max_len": 64,
    }


@pytest.fixture
def notes(capsys: pytest.CaptureFixture[str]) -> Callable[[], list[str]]:
    """The notes printed so far, as if none had been printed before this test."""
    note.cache_clear()
    return lambda: capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("attn=qk_norm seed=1", "attn=mha attn.qk_norm=true seed=1"),
        ("attn=qk_norm attn.n_kv_heads=2", "attn=gqa attn.qk_norm=true attn.n_kv_heads=2"),
        ("pos=rope pos.fraction=0.5", "pos=rope pos.rotary_fraction=0.5"),
        ("attn=pattern attn.order=[local,global]", "attn=pattern attn.pattern=[local,global]"),
        (
            "attn=pattern attn@attn.local=qk_norm attn.local.n_kv_heads=2 attn@attn.global=mha",
            "attn=pattern attn@attn.local=gqa attn.local.qk_norm=true attn.local.n_kv_heads=2 "
            "attn@attn.global=mha",
        ),
    ],
)
def test_old_overrides_mean_what_they_meant_with_a_note(
    old: str, new: str, notes: Callable[[], list[str]]
) -> None:
    for _ in range(2):
        assert current_overrides("train", old.split()) == new.split()
    assert len(notes()) == 1
    compose(new.split())
    assert current_overrides("train", new.split()) == new.split()
    assert not notes()


@pytest.mark.parametrize("command", ["eval", "sample"])
def test_positions_may_be_spelled_as_before_in_every_command(command: str) -> None:
    old = ["run=x", "pos=rope_yarn", "pos.fraction=0.5", "pos.original_len=64"]
    pos = compose(current_overrides(command, old), door=command)["pos"]
    assert (pos["rotary_fraction"], pos["original_max_len"]) == (0.5, 64)


def test_one_value_of_a_sweep_may_be_an_old_one(notes: Callable[[], list[str]]) -> None:
    cells = cells_of(["attn=mha,qk_norm", "pos=rope", "seed=0,1"], multirun=True)
    assert [compose(cell)["attn"]["qk_norm"] for cell in cells] == [False, False, True, True]
    assert notes() == ["note: attn=qk_norm is now attn=mha attn.qk_norm=true"]


def test_lines_of_a_config_may_be_old_ones() -> None:
    lines = "['attn=qk_norm pos=rope pos.fraction=0.5,1','attn=qk_norm attn.n_kv_heads=2']"
    cells = cells_of([f"sweep={lines}"], multirun=False)
    configs = [compose(cell) for cell in cells]
    assert [config["choices"]["attn"] for config in configs] == ["mha", "mha", "gqa"]
    assert [config["pos"].get("rotary_fraction") for config in configs] == [0.5, 1, None]
    assert cells_of([f"sweep={lines}", "attn=mla"], multirun=False)[0] == [
        "pos=rope", "pos.rotary_fraction=0.5", f"sweep={lines}", "attn=mla", "sweep=null",
    ]  # fmt: skip
    (cell,) = cells_of(["stages=['attn=mha','attn=qk_norm']"], multirun=False)
    stages = [compose(stage) for stage in stages_of(cell, compose(cell))]
    assert [stage["attn"]["qk_norm"] for stage in stages] == [False, True]


def test_a_baseline_may_be_an_old_one() -> None:
    old = baseline_overrides("attn=qk_norm pos=rope pos.fraction=0.5")
    assert old == ["attn=mha", "attn.qk_norm=true", "pos=rope", "pos.rotary_fraction=0.5"]
    ask = ["attn=mqa", "pos=rope", "match=params"]
    budgets = {
        compose_matched([*ask, f"baseline='attn={attn} pos=rope'"])["matched"]["target"]
        for attn in ("qk_norm", "mha attn.qk_norm=true")
    }
    assert len(budgets) == 1
