"""What is counted before training equals what is measured after it."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import RUN, build, tokens, variants

from cli.train import train
from compare.check.properties import CPU, VOCAB, TinyVariant, composed
from compare.cost import plan as plans
from compare.cost.counts import cost, training_bytes
from train import step_estimate as probe
from train.config.compose import compose
from train.config.schema import Config
from train.measure import device as devices
from train.run import run_training
from train.setup.run_setup import check
from train.sweep.expand import cells_of

BFLOAT16 = devices.Device("cpu", torch.bfloat16)


@variants
def test_counts_equal_the_built_model(attn: str, pos: str) -> None:
    model = build(attn, pos)
    counted = cost(TinyVariant(attn, pos).config(), VOCAB, CPU)
    assert counted.params == sum(p.numel() for p in model.parameters())
    for device in (CPU, BFLOAT16):
        cache = model.new_cache(16)
        with torch.no_grad(), device.autocast():
            model(tokens(1, 16), cache)
        config = TinyVariant(attn, pos).config()
        assert cost(config, VOCAB, device).cache_bytes == cache.nbytes


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


def test_many_heads_have_as_many_parameters_as_one() -> None:
    cells = cells_of(["experiment=coursework/many_heads", "seed=0"], multirun=False)
    configs = [compose(cell) for cell in cells]
    heads = [config["model"]["n_heads"] for config in configs]
    assert heads == [n for n in (1, 2, 3, 6, 12) for _ in ("learned", "rope")]
    for pos in ("learned", "rope"):
        same = [cost(c, 65, CPU) for c in configs if c["choices"]["pos"] == pos]
        assert len({(c.params, c.cache_elements, c.flops_per_token) for c in same}) == 1


@pytest.mark.parametrize(
    ("size", "params", "params_of_128000", "kv_elements"),
    [
        ("8b", 8_030_261_248, 8_028_164_096, 65_536),
        ("70b", 70_553_706_496, 70_549_512_192, 163_840),
        ("405b", 405_853_388_800, 405_845_000_192, 258_048),
    ],
)
def test_llama_3_is_counted_as_it_was_published(
    size: str, params: int, params_of_128000: int, kv_elements: int
) -> None:
    """Meta gives 8.03, 70.6 and 405 billion parameters, and 3.8e25 FLOPs for the training of 405B."""
    asked = ["experiment=llama3", f"model=llama3_{size}"]
    cells = [compose(cell) for cell in cells_of(asked, multirun=False)]
    gqa, mha, mqa = (cost(config, 1, BFLOAT16) for config in cells)
    assert gqa.params == params
    assert gqa.cache_elements == kv_elements * gqa.length == kv_elements * 8192
    assert mha.cache_bytes / gqa.cache_bytes == cells[0]["model"]["n_heads"] / 8
    assert gqa.cache_bytes / mqa.cache_bytes == 8
    smaller = cells[0] | {"model": cells[0]["model"] | {"vocab_size": 128_000}}
    assert cost(smaller, 1, CPU).params == params_of_128000
    if size == "8b":
        assert (gqa.cache_bytes / 8192, mha.cache_bytes / 8192) == (131_072, 524_288)
    if size == "405b":
        tokens = cells[0]["steps"] * cells[0]["batch_size"] * gqa.length
        assert tokens == pytest.approx(15.6e12, rel=1e-5)
        assert gqa.flops_per_token * tokens == pytest.approx(3.8e25, rel=0.05)


def test_what_llama_3_costs_is_told_without_its_text_or_its_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("compare.cost.plan.corpus_of", "compare.cost.counts.training_bytes"):
        monkeypatch.setattr(name, None)
    monkeypatch.setattr(devices, "memory_bytes", lambda device: 2**36)
    asked = ["data.path=README.md", "threads=1", "model=llama3_8b", "attn=mqa"]
    assert train(["experiment=llama3", *asked]) == 0
    training, decoding = (line for line in capsys.readouterr().out.splitlines() if "mqa" in line)
    assert training.split()[2] == "7,795,380,224"
    assert re.search(r" over 91,\d\d\d +- +does not fit +-$", training)
    assert decoding.endswith(" 16,384")


def test_whether_a_run_fits_a_gpu_is_told_without_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    ask = ["-m", "plan=true", "model=gpt2", "data.path=README.md", f"data.cache={tmp_path}"]
    assert train([*ask, "batch_size=64", "device=cuda:T4,cuda:H100", "eval_batch_size=8"]) == 0
    t4, h100 = (
        line for line in capsys.readouterr().out.splitlines() if "MiB" not in line and "fit" in line
    )
    assert "cuda-T4" in t4
    assert "does not fit" in t4
    assert "cuda-H100" in h100
    assert " fits " in h100
    assert float(t4.split()[-6].replace(",", "")) > 15_259  # MiB of one
    for wrong, why in (
        ("device=cuda:T5", "T5: no such choice; known: 3090, 4090"),
        ("device=cuda:T4 dtype=bfloat16", "a T4 has no bfloat16; float16 and float32 work"),
    ):
        with pytest.raises(ValueError, match=why):
            train(["plan=true", "data.path=README.md", *wrong.split()])


@pytest.mark.parametrize("variant", ["pos=t5", "attn=lstm pos=none", "attn=additive pos=none"])
def test_what_no_fused_kernel_trains_is_planned_for_a_gpu_too(
    variant: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    places = ["data.path=README.md", f"data.cache={tmp_path}", "device=cuda:A100"]
    assert train([*RUN, *places, "plan=true", *variant.split()]) == 0
    assert " fits " in capsys.readouterr().out


def test_the_work_of_counting_a_peak_is_linear_in_the_layers() -> None:
    calls = {n: calls_of_training_bytes(n) for n in (2, 2, 4, 8)}  # the first one imports
    assert calls[8] - calls[4] < 2.2 * (calls[4] - calls[2])


def calls_of_training_bytes(n_layers: int) -> int:
    """Function calls that the peak of a tiny model takes: a clock that no other process disturbs."""
    config = composed("pos=rope", "data.path=README.md", f"model.n_layers={n_layers}")
    events: Counter[str] = Counter()
    sys.setprofile(lambda frame, event, argument: events.update([event]))
    try:
        training_bytes(config, VOCAB, CPU)
    finally:
        sys.setprofile(None)
    return events["call"]


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
    """Nor is its peak counted where parameters and optimizer alone are too much."""
    least, peaks = check(config()).least_bytes, []
    for there in (least, least + 1):
        monkeypatch.setattr(devices, "memory_bytes", lambda device, there=there: there)
        training, _, seconds = plans.rows_of(config(), None)
        assert "does not fit" in training
        assert seconds is None
        peaks.append(training[3])
    assert peaks[0] == f"over {least / 2**20:,.0f}"
    assert float(peaks[1]) * 2**20 > least


def test_a_forecast_has_the_seconds_of_every_run_that_can_be_timed(
    config: Callable[..., Config],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [(f"{attn}{seed}", config(f"attn={attn}", f"seed={seed}", "steps=12", "eval_every=null"))
            for attn in ("mha", "mqa") for seed in (0, 1)]  # fmt: skip
    monkeypatch.setattr(plans, "corpus_of", lambda config: (VOCAB, 0))
    monkeypatch.setattr(plans, "probed", lambda models: [0.5, None])
    assert plans.forecast(runs, 1) == dict.fromkeys(("mha0", "mha1"), plans.OVERHEAD + 6)
    assert "4 runs one after the other: at least 52 s" in capsys.readouterr().err
