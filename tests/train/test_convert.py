"""From many KV heads to few."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build, tokens
from torch import Tensor

from data.atomic import replace
from train.config.options import HOW
from train.config.schema import Config
from train.record.run_log import records
from train.run import run_training
from train.setup.convert import fit_to_shape
from train.setup.run_setup import assemble, check

Make = Callable[..., Config]


def weights_of(attn: str, *overrides: str) -> dict[str, Tensor]:
    model = build(attn, "rope", "model.bias=true", *overrides)
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}


def test_a_new_head_is_the_mean_of_those_whose_queries_it_serves() -> None:
    weights = weights_of("mha")
    gqa = build("gqa", "rope", "model.bias=true")  # 4 heads become 2
    for name in ("k.weight", "v.weight", "k.bias", "v.bias"):
        full = f"blocks.1.attention.{name}"
        heads = weights[full].unflatten(0, (4, 8))
        mean = fit_to_shape(weights, gqa, "mean")[full].unflatten(0, (2, 8))
        torch.testing.assert_close(mean[0], (heads[0] + heads[1]) / 2)
        torch.testing.assert_close(mean[1], (heads[2] + heads[3]) / 2)
        first = fit_to_shape(weights, gqa, "first")[full].unflatten(0, (2, 8))
        assert torch.equal(first, heads[[0, 2]])
        assert torch.equal(fit_to_shape(weights, gqa, "random")[full], gqa.get_parameter(full))


@pytest.mark.parametrize("how", ["mean", "first"])
def test_heads_that_were_alike_lose_nothing(how: str) -> None:
    weights = weights_of("mha")
    for name in [n for n in weights if ".attention.k." in n or ".attention.v." in n]:
        heads = weights[name].unflatten(0, (4, 8))
        weights[name] = heads[[0, 0, 2, 2]].flatten(0, 1)
    mha, gqa = build("mha", "rope", "model.bias=true"), build("gqa", "rope", "model.bias=true")
    mha.load_state_dict(weights | {"head.weight": weights["embed.weight"]})
    gqa.load_state_dict(fit_to_shape(weights, gqa, how) | {"head.weight": weights["embed.weight"]})
    with torch.no_grad():
        torch.testing.assert_close(gqa(tokens(2, 16)), mha(tokens(2, 16)))


def test_gqa_converts_further_and_all_else_stays() -> None:
    weights, mqa = weights_of("gqa"), build("mqa", "rope", "model.bias=true")
    adapted = fit_to_shape(weights, mqa, "mean")
    name = "blocks.0.attention.k.weight"
    torch.testing.assert_close(adapted[name], weights[name].unflatten(0, (2, 8)).mean(0))
    for other in weights.keys() - {n for n in weights if ".k." in n or ".v." in n}:
        assert adapted[other] is weights[other]


def test_heads_have_the_width_of_their_mechanism() -> None:
    """Keys of attn=rank are narrower than values."""
    rank = ("attn.rank=4", "model.bias=true")
    weights = dict(build("rank", "rope", *rank, "attn.n_kv_heads=4").named_parameters())
    few = build("rank", "rope", *rank, "attn.n_kv_heads=2")
    for part, width in (("k", 4), ("v", 8)):
        name = f"blocks.0.attention.{part}.weight"
        heads = weights[name].unflatten(0, (4, width))
        found = fit_to_shape(weights, few, "mean")[name].unflatten(0, (2, width))
        torch.testing.assert_close(found, heads.unflatten(0, (2, 2)).mean(1))


def test_heads_that_do_not_group_are_left_to_be_refused() -> None:
    weights = weights_of("gqa")
    mha = build("mha", "rope", "model.bias=true")
    name = "blocks.0.attention.k.weight"
    assert fit_to_shape(weights, mha, "mean")[name] is weights[name]


def test_conversion_starts_from_the_parents_loss_and_recovers(config: Make, tmp_path: Path) -> None:
    parent = config("attn=mha", "pos=rope", "steps=60", f"out={tmp_path}/mha")
    assert run_training(parent) == 0
    starts, ends = {}, {}
    for how in HOW:
        out = tmp_path / how
        asked = ["attn=gqa", "pos=rope", "steps=20", f"convert={how}", f"out={out}"]
        assert run_training(config(*asked, f"init_from={tmp_path}/mha")) == 0
        summary = json.loads((out / "summary.json").read_text())
        lines = [r for r in records(out / "metrics.jsonl") if r["split"] == "val"]
        assert [r["step"] for r in lines] == [0, 5, 10, 15, 20]
        starts[how], ends[how] = summary["start_val_loss"], summary["val_loss"]
        assert starts[how] == lines[0]["loss"]
    shutil.rmtree(tmp_path / "mean/checkpoints")  # as if killed before the first
    replace(tmp_path / "mean/status.json", '{"state": "interrupted"}')
    again = ["attn=gqa", "pos=rope", "steps=20", f"out={tmp_path}/mean", "resume=true"]
    assert run_training(config(*again, f"init_from={tmp_path}/mha")) == 0
    redone = [r["step"] for r in records(tmp_path / "mean/metrics.jsonl") if r["split"] == "val"]
    assert redone == [0, 5, 10, 15, 20]
    before = json.loads((tmp_path / "mha/summary.json").read_text())
    assert before["start_val_loss"] is None
    assert before["val_loss"] < starts["mean"] < starts["random"]
    assert all(ends[how] < starts[how] for how in HOW)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["attn=mla", "pos=rope"], r"\(attn=mha pos=rope model=nano\): blocks.0.attention.down"),
        (["attn=gqa", "pos=learned"], "position.table.weight is missing"),
        (["attn=mha", "pos=rope", "model.n_heads=2"], "it has 4 heads, model.n_heads=2 here"),
        (["attn=gqa", "pos=rope", "convert=median"], "convert=median: no such choice"),
    ],
)
def test_what_cannot_be_converted_is_refused_in_one_line(
    config: Make, tmp_path: Path, overrides: list[str], message: str
) -> None:
    assert run_training(config("attn=mha", "pos=rope", "steps=1", f"out={tmp_path}/mha")) == 0
    with pytest.raises(ValueError, match=message):
        assemble(check(config(*overrides, f"init_from={tmp_path}/mha")))
