"""Names of earlier versions, in saved configs and on the command line."""

from typing import Any

import pytest

from train.config.compose import compose
from train.config.old_spellings import current_overrides, modernise

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


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["attn=qk_norm", "seed=1"], ["attn=mha", "attn.qk_norm=true", "seed=1"]),
        (["attn=qk_norm", "attn.n_kv_heads=2"], ["attn=gqa", "attn.n_kv_heads=2", "attn.qk_norm=true"]),
        (["pos=rope", "pos.fraction=0.5"], ["pos=rope", "pos.rotary_fraction=0.5"]),
        (["attn=pattern", "attn.order=[local,global]"], ["attn=pattern", "attn.pattern=[local,global]"]),
    ],
)  # fmt: skip
def test_old_overrides_compose_to_the_same_with_a_note(old: list[str], new: list[str]) -> None:
    notes: list[str] = []
    assert compose(current_overrides("train", old, notes.append)) == compose(new)
    assert len(notes) == 1
    assert current_overrides("train", new, notes.append) == new
    assert len(notes) == 1
