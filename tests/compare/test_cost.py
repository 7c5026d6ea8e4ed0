"""What is counted before training equals what is measured after it."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import build, tokens, variants

from cli.train import train
from compare.check.properties import CPU, VOCAB, TinyVariant, composed
from compare.cost import plan as plans
from compare.cost import step_estimate as probe
from compare.cost.counts import cost, training_bytes
from train.config.compose import compose
from train.config.schema import Config
from train.measure import device as devices
from train.measure import timer
from train.run import run_training
from train.step import TrainStep
from train.sweep.expand import cells_of

BFLOAT16 = devices.Device("cpu", torch.bfloat16)


@variants
def test_counts_equal_the_built_model(attn: str, pos: str) -> None:
    model = build(attn, pos)
    counted = cost(TinyVariant(attn, pos).config(), VOCAB, CPU)
    assert counted.params == sum(p.numel() for p in model.parameters())
    cache = model.new_cache(16)
    with torch.no_grad():
        model(tokens(1, 16), cache)
    assert counted.cache_bytes == cache.nbytes
    assert cost(composed(f"attn={attn}"), VOCAB, BFLOAT16).cache_bytes * 2 == cache.nbytes


def test_the_coursework_table_comes_out_to_the_digit() -> None:
    configs = [compose(cell) for cell in cells_of(["experiment=coursework/cost"], multirun=False)]
    mha, gqa, mqa = (cost(config, 50257, CPU) for config in configs)
    assert mha.length == 1024
    assert mha.attention_flops_uncached / 2 == 1_211_893_248
    assert mha.attention_flops / 2 == 3_933_696
    assert mqa.attention_flops / 2 == 2_852_352
    assert gqa.attention_flops / 2 == 3_147_264
    assert (mha.cache_elements, mqa.cache_elements) == (1_572_864, 131_072)
    assert gqa.cache_elements == 524_288


@pytest.mark.parametrize("attn", ["mha", "mla", "sliding"])
@pytest.mark.parametrize(
    "options", [[], ["optim=muon", "dtype=bfloat16", "accumulate=2", "memory=lean"]], ids=len
)
def test_the_expected_peak_is_the_measured_one(
    config: Callable[..., Config], attn: str, options: list[str], tmp_path: Path
) -> None:
    asked = config(f"attn={attn}", "pos=t5", "batch_size=32", *options)
    assert run_training(asked) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    vocab = len(json.loads((tmp_path / "run/tokenizer.json").read_text())["model"]["vocab"])
    device = devices.select_device("cpu", summary["dtype"])
    expected = training_bytes(asked, vocab, device)
    generators = 6 * 5056 if asked["memory"] == "lean" else 0  # states kept to compute again
    measured = summary["peak_train_bytes"] - generators
    # Some CPUs (AVX512-BF16 without AMX) take scratch memory of their own to multiply bfloat16.
    scratch = 2**16 if summary["dtype"] == "bfloat16" else 0
    assert -0.02 * measured <= measured - expected["total"] <= 0.02 * measured + scratch
    assert expected["parameters"] == summary["parameter_bytes"]
    assert expected["optimizer"] == summary["optimizer_bytes"]


def test_the_plan_of_a_sweep_trains_nothing(
    config: Callable[..., Config],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: Path,
) -> None:
    monkeypatch.setattr(probe, "BUDGET", 0.05)
    monkeypatch.chdir(tmp_path)
    asked = ["model=coursework", "data=text", f"data.path={text}", "data.tokenizer=char",
             f"data.cache={tmp_path}/cache", "threads=1"]  # fmt: skip
    spelled = ["batch_size=1e1", "steps=1e1", "optim.lr=1e30", "optim.warmup=0"]
    assert train([*asked, *spelled, "plan=true", "-m", "attn=mha,mqa", "seed=0,1"]) == 0
    printed = capsys.readouterr().out
    vocab = len(set(text.read_text()))
    for attn in ("mha", "mqa"):
        counted = cost(compose([*asked, f"attn={attn}"]), vocab, CPU)
        assert len(re.findall(rf"attn-{attn}_seed-\d +{counted.params:,} ", printed)) == 2
    assert "training time of all" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_a_run_that_cannot_fit_is_not_probed(
    config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "memory_bytes", lambda device: 1000)
    training, _, seconds = plans.rows_of(config())
    assert "does not fit" in training
    assert seconds is None


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
