"""Evaluation of finished runs: exact scores, length, decoding, attention, and what is refused."""

import itertools
import json
import math
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import RUN, build, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cli.entry import run_command
from cli.evaluate import evaluate
from cli.sample import sample
from compare import evaluate as package
from compare.evaluate import attention, decode
from compare.evaluate.dataset import open_text
from compare.evaluate.load import LoadedRun, RunSelector, environment_variables
from compare.report.evaluations import kinds as evaluations
from compare.report.variants import Variant
from compare.report.write import write
from compare.statistics.paired import ratio_interval
from data.tokenizer import END_OF_TEXT, encode
from model.loss import token_nll
from train.config.compose import CONFIGS, compose
from train.measure.device import Device
from train.run import run_training

Answer = dict[str, Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A folder with three finished runs on one text: rope, learned, and rope on other tokens."""
    folder = tmp_path_factory.mktemp("runs")
    documents = text.read_text(encoding="utf-8").split("\n\n")
    rows = folder / "documents.jsonl"
    rows.write_text("".join(json.dumps({"text": d + "\n\n"}) + "\n" for d in documents if d))
    kinds = {"rope": "pos=rope", "learned": "pos=learned", "bytes": "pos=rope data.tokenizer=byte"}
    for name, overrides in kinds.items():
        train_on(folder, folder / name, "steps=4", *overrides.split())
    return folder


def train_on(folder: Path, out: Path, *overrides: str) -> None:
    """Train a run on the text of a folder of runs."""
    places = [f"data.path={folder}/documents.jsonl", f"data.cache={folder}/cache", f"out={out}"]
    tokenizer = ["data.tokenizer=bpe", "data.vocab_size=300", "data.val_fraction=0.5"]
    assert run_training(compose([*RUN, *places, *tokenizer, *overrides])) == 0


def opened(folder: Path) -> LoadedRun:
    return RunSelector(
        run=str(folder), checkpoint="latest", device="cpu", dtype="float32", threads=1
    ).load(folder)


def answer(capsys: pytest.CaptureFixture[str], *overrides: str) -> Answer:
    """What `python eval.py` writes."""
    assert evaluate([*overrides, "dtype=float32", "threads=1"]) == 0
    path = capsys.readouterr().out.split("written: ")[1].split()[0]
    return dict(json.loads(Path(path).read_text()))


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 4), (16, 5), (16, 1), (7, 3)])
@pytest.mark.parametrize("length", [2, 17, 18, 60])
def test_each_token_is_scored_once_with_the_history_it_may_have(
    context: int, stride: int, length: int
) -> None:
    model, text = build("mha", "rope"), tokens(length)
    expected = []
    for t in range(1, length):
        start = max(0, -((context - t) // stride)) * stride  # the first window that reaches t
        assert 1 <= t - start <= context
        assert t - start > context - stride or start == 0
        logits = model(text[None, start:t])[0, -1].log_softmax(dim=-1)
        expected.append(-logits[text[t]])
    for rows in (1, 3, 64):
        nats = token_nll(model, text, context=context, stride=stride, batch_size=rows, device="cpu")
        torch.testing.assert_close(nats, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_stride_that_leaves_tokens_out_is_refused() -> None:
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"stride={stride}"):
            token_nll(build("mha", "rope"), tokens(9), context=16, stride=stride, batch_size=1,
                       device="cpu")  # fmt: skip


def test_the_units_of_a_bootstrap_hold_every_token_and_byte_once(runs: Path) -> None:
    run = opened(runs / "rope")
    text = open_text(run, None, None, None)
    kind, unit, sizes = text.bootstrap_units()
    documents = text.corpus.documents["val"]
    assert kind == "documents"
    assert len(sizes) == len(documents) >= 20
    assert sizes.sum() == text.scored_bytes
    ends = np.r_[documents[1:, 0], len(text.tokens)]
    assert [list(np.flatnonzero(unit == i) + 1) for i in range(len(sizes))] == [
        list(range(max(1, first), end)) for first, end in zip(documents[:, 0], ends, strict=True)
    ]
    one = np.array([[0, len(text.tokens), documents[:, 2].sum()]])
    joined = replace(text, corpus=replace(text.corpus, documents={"val": one}))
    kind, unit, sizes = joined.bootstrap_units()
    assert kind == "blocks"
    assert np.bincount(unit).min() >= len(unit) // 100
    assert sizes.sum() == pytest.approx(text.scored_bytes)


def test_an_interval_of_a_ratio_covers_as_often_as_it_says() -> None:
    random, inside = np.random.default_rng(0), 0
    for _ in range(100):
        sizes = random.integers(50, 500, 40)
        low, high = ratio_interval(sizes * 3.0 + random.normal(0, 30, 40), sizes)
        inside += low <= 3.0 <= high
    assert 85 <= inside <= 99
    assert ratio_interval(np.zeros(5), np.ones(5)) == (0.0, 0.0)


def test_a_run_against_itself_does_not_differ(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, f"run={runs}/rope", f"reference={runs}/rope", "stride=4")
    low, high = found["perplexity_interval"]
    assert low < found["perplexity"] < high
    assert found["stride"] == 4
    other = found["reference"]
    assert other["perplexity_ratio"] == 1
    assert other["perplexity_ratio_interval"] == [1, 1]
    assert other["bits_per_byte_difference_interval"] == [0, 0]


def test_a_pair_differs_by_less_noise_than_each_has(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = answer(capsys, f"run={runs}/rope", f"reference={runs}/learned")
    other = found["reference"]
    assert other["loss_difference"] == pytest.approx(found["loss"] - other["loss"])
    low, high = other["loss_difference_interval"]
    assert low <= other["loss_difference"] <= high
    spread = math.log(found["perplexity_interval"][1] / found["perplexity_interval"][0])
    assert high - low < spread


def test_four_bit_weights_are_scored_beside_the_whole_ones(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = [f"run={runs}/rope", "weights=nf4", f"reference={runs}/rope"]
    found = answer(capsys, *ask)
    assert found["weights"] == "nf4"
    assert 0 < abs(found["reference"]["perplexity_ratio"] - 1) < 0.05
    assert [p.name for p in (runs / "rope/eval").glob("*_nf4_vs-rope-*.json")]
    with pytest.raises(ValueError, match="weights=int3: no such choice"):
        evaluate([f"run={runs}/rope", "weights=int3"])


def test_perplexity_is_not_compared_across_tokenizers_but_bits_are(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate([f"run={runs}/rope", f"reference={runs}/bytes", "threads=1"]) == 0
    said = capsys.readouterr().out
    assert "not compared: the tokenizers differ" in said
    found = json.loads(Path(said.split("written: ")[1].strip()).read_text())
    other = found["reference"]
    assert other["perplexity_ratio"] is other["loss_difference"] is None
    assert other["bits_per_byte_difference"] == pytest.approx(
        found["bits_per_byte"] - other["bits_per_byte"]
    )
    low, high = other["bits_per_byte_difference_interval"]
    assert low < other["bits_per_byte_difference"] < high


def test_another_text_is_read_whole_in_the_tokens_of_the_run(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("Ünïcode, 漢字 and 🙂; " * 40, encoding="utf-8")
    found = answer(capsys, f"run={runs}/rope", f"data.path={foreign}", f"data.cache={tmp_path}/c")
    ids = encode(opened(runs / "rope").tokenizer, foreign.read_text(encoding="utf-8"))
    assert found["tokens"] == len(ids) - 1
    assert found["bytes"] == len(foreign.read_bytes()) - 1  # a byte of Ü is the first token
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / found["bytes"] / math.log(2))
    assert found["resampled"].endswith("blocks")


def test_length_agrees_with_perplexity_and_says_where_it_is_not_defined(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = answer(capsys, f"run={runs}/rope")
    linear = answer(capsys, f"run={runs}/rope", "context=32", "pos=rope_linear", "pos.factor=2")
    both = f"run={runs}/rope,{runs}/learned"
    assert evaluate([both, "eval=length", "contexts=[0.5,1,2]", "dtype=float32", "threads=1"]) == 0
    assert "not defined" in capsys.readouterr().out
    found = json.loads((runs / "rope/eval/length.json").read_text())
    losses = {(row["pos"], row["context"]): row["loss"] for row in found["rows"]}
    assert losses["rope", 16] == plain["loss"]
    assert losses["rope_linear", 32] == linear["loss"]
    assert set(losses) == {("rope", 8), ("rope", 16), ("rope", 32)} | {
        (f"rope_{kind}", 32) for kind in ("linear", "ntk", "yarn")
    }
    buckets = found["positions"]["rope"]
    assert [(b["start"], b["end"]) for b in buckets] == [(0, 16), (16, 32)]
    mean = sum(b["loss"] * b["tokens"] for b in buckets) / sum(b["tokens"] for b in buckets)
    assert mean == pytest.approx(losses["rope", 32])
    learned = json.loads((runs / "learned/eval/length.json").read_text())["rows"]
    assert [row["loss"] is None for row in learned] == [False, False, True]
    assert (runs / "eval/length.svg").exists()


def test_decoding_is_timed_and_its_cache_counted_and_the_report_shows_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = f"run={runs}/rope,{runs}/learned"
    sizes = ["batch_sizes=[1,3]", "contexts=[8,16,32]", "tokens=4", "repeats=2"]
    assert evaluate([both, "eval=decode", *sizes, "dtype=float32", "threads=1"]) == 0
    assert evaluate([both, "eval=attention", "num_windows=2", "dtype=float32", "threads=1"]) == 0
    rows = json.loads((runs / "rope/eval/decode.json").read_text())["rows"]
    assert len(rows) == 6
    assert len(json.loads((runs / "learned/eval/decode.json").read_text())["rows"]) == 4
    for row in rows:
        size = row["batch_size"] * row["context"]
        assert row["cache_bytes"] == row["cache_bytes_analytic"] == size * 3 * 2 * 32 * 4
        assert row.pop("launch_share") is None  # on a CPU a step is nothing else
        assert min(value for key, value in row.items() if not key.endswith("iqr")) > 0
    write([runs / "rope", runs / "learned"])
    report = (runs / "rope/report.md").read_text()
    assert "### Decoding speed" in report
    assert "### Attention heads" in report
    assert {"decode.svg", "attention.svg"} <= {p.name for p in (runs / "rope/figures").iterdir()}
    assert "launching" not in report
    decoded = json.loads((runs / "rope/eval/decode.json").read_text())
    for row in decoded["rows"]:  # as of a GPU
        row["launch_share"] = 0.97
    (runs / "rope/eval/decode.json").write_text(json.dumps(decoded))
    write([runs / "rope", runs / "learned"])
    report = (runs / "rope/report.md").read_text()
    assert "97%" in report.partition("### Decoding speed")[2].partition("###")[0]
    assert "The device waits for Python" in report


class Largest(TorchDispatchMode):
    """The most elements that any tensor had that an operator made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in held:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("attn", "heads"), [("mqa", 1), ("gqa", 2), ("mha", 4)])
def test_a_decoding_step_makes_nothing_as_large_as_the_cache_of_a_layer(
    attn: str, heads: int, dtype: torch.dtype
) -> None:
    model = build(attn, "rope", "model.max_len=600")
    cache, text = model.new_cache(600), tokens(2, 600)
    with torch.no_grad(), Device("cpu", dtype).autocast():
        model(text[:, :590], cache)
        places = [b.data_ptr() for layer in cache.layers for b in layer.buffers]
        with Largest() as made:
            model(text[:, 590:591], cache)
    assert made.elements < 2 * heads * 590 * 8 or made.elements <= 2 * 4 * 591  # or its scores
    assert places == [b.data_ptr() for layer in cache.layers for b in layer.buffers]


def test_the_readouts_of_even_attention_are_those_of_counting(runs: Path) -> None:
    run = opened(runs / "rope")
    for layer in run.model.attention_layers:
        torch.nn.init.zeros_(layer.q.weight)  # type: ignore[arg-type, union-attr]
    expected = attention.uniform_readouts(16)
    for layer in attention.head_readouts(run, attention.random_repeats(run, 2)):
        assert layer.keys() == expected.keys()
        for readout, heads in layer.items():
            assert np.array(heads) == pytest.approx(np.array([expected[readout]] * 4), rel=1e-5)


def test_distances_lie_in_buckets_that_double() -> None:
    assert attention.distance_names(1) == ["0"]
    assert attention.distance_names(16) == ["0", "1", "2-3", "4-7", "8-15"]
    assert attention.distance_names(20)[-2:] == ["8-15", "16-19"]


@pytest.mark.parametrize("length", [1, 2, 5, 16, 20])
def test_the_weight_at_all_distances_is_one_and_that_of_even_attention_a_share_of_keys(
    length: int,
) -> None:
    pos = torch.arange(length)
    distance = pos[:, None] - pos
    drawn = torch.rand(3, length, length, generator=torch.Generator().manual_seed(0)).tril()
    drawn = drawn / drawn.sum(dim=-1, keepdim=True)
    found = attention.by_distance(drawn, distance, length)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(3, length))
    even = torch.ones(length, length).tril() / (pos[:, None] + 1)
    starts = [*attention.distance_starts(length), length]
    for query, buckets in enumerate(attention.by_distance(even, distance, length)):
        keys = [len(range(a, min(b, query + 1))) for a, b in itertools.pairwise(starts)]
        torch.testing.assert_close(buckets, torch.tensor(keys) / (query + 1))


def test_the_keys_that_hold_most_of_the_weight_are_counted_by_size() -> None:
    for n in (1, 3, 10, 1000):
        even = torch.full((n,), 1 / n)
        assert attention.keys_held(even).item() == pytest.approx(0.9 * n, rel=1e-3)
    weights = torch.tensor([[0.1, 0.0, 0.7, 0.2], [0.0, 0.95, 0.05, 0.0], [0.5, 0.0, 0.0, 0.5]])
    expected = torch.tensor([2.0, 0.9 / 0.95, 1.8])
    torch.testing.assert_close(attention.keys_held(weights), expected)


def readouts_of(attn: str, pos: str, *overrides: str) -> list[dict[str, Any]]:
    """The readouts of an untrained model on 64 random tokens."""
    model = build(attn, pos, "model.max_len=64", *overrides)
    run: Any = SimpleNamespace(model=model, device=Device("cpu", torch.float32))
    return attention.head_readouts(run, tokens(4, 64))


def test_a_window_leaves_no_weight_beyond_it() -> None:
    for layer in readouts_of("sliding", "rope", "attn.window=4"):
        mass = np.array(layer["mass"])  # (H, buckets)
        assert (mass[:, :3] > 0.1).all()  # distances 0, 1, 2-3
        assert (mass[:, 3:] == 0).all()
        assert max(layer["keys_held"]) < 4 / 32  # of at least 33 keys
    assert all(np.array(layer["mass"]).min() > 0 for layer in readouts_of("mha", "rope"))


def test_alibi_orders_heads_by_reach() -> None:
    """Slopes fall from head to head, so each one reaches further and spreads wider than the one before."""
    for layer in readouts_of("mha", "alibi"):
        for readout in ("distance", "entropy", "keys_held"):
            assert layer[readout] == sorted(layer[readout])
            assert len(set(layer[readout])) == 4
        far = [head[-1] for head in layer["mass"]]
        assert far == sorted(far)


@pytest.mark.parametrize("pos", ["learned", "rope", "none"])
def test_all_heads_start_nearly_even(pos: str) -> None:
    even = attention.uniform_readouts(64)
    for layer in readouts_of("mha", pos):
        for head in layer["mass"]:
            assert head == pytest.approx(even["mass"], abs=1e-3)
        assert layer["keys_held"] == pytest.approx([0.9] * 4, abs=0.01)


def test_an_untrained_run_is_read_too(text: Path, tmp_path: Path) -> None:
    places = [f"data.path={text}", f"data.cache={tmp_path}/cache", f"out={tmp_path}/run"]
    assert run_training(compose([*RUN, *places, "steps=0"])) == 0
    asked = [f"run={tmp_path}/run", "eval=attention", "num_windows=2", "threads=1"]
    assert evaluate([*asked, "device=cpu", "dtype=float32"]) == 0
    found = json.loads((tmp_path / "run/eval/attention.json").read_text())
    assert found["step"] == 0
    assert found["layers"][0]["keys_held"] == pytest.approx([0.9] * 4, abs=0.02)


@pytest.mark.parametrize("length", [16, 150])
def test_a_map_is_the_mean_attention_matrix_pooled(length: int) -> None:
    model = build("gqa", "alibi", f"model.max_len={length}")
    run: Any = SimpleNamespace(model=model, device=Device("cpu", torch.float32))
    text = tokens(3, length)
    maps = attention.head_maps(run, text)
    found = np.array(maps[0].means)
    cells = min(length, attention.CELLS)
    assert found.shape == (4, cells, cells)
    assert found.sum(axis=2) == pytest.approx(np.ones((4, cells)), abs=cells * 1e-4)
    assert (np.triu(found, 1) == 0).all()
    with torch.no_grad():
        x = model.blocks[0].attention_norm(model.embed(text))
        weights = model.attention_layers[0].weights(x, model.position.at(torch.arange(length)))
    ends = [np.flatnonzero(np.arange(length) * cells // length == c)[[0, -1]] for c in range(cells)]
    (top, bottom), (left, right) = ends[cells // 2], ends[cells // 4]
    block = weights.mean(dim=0)[:, top : bottom + 1, left : right + 1]
    expected = block.sum(dim=2).mean(dim=1).numpy()
    assert found[:, cells // 2, cells // 4] == pytest.approx(expected, abs=1e-4)


def test_attention_by_distance_and_maps_are_shown_and_reported(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"run={runs}/rope,{runs}/learned", "eval=attention", "num_windows=2", "threads=1"]
    assert evaluate([*asked, "dtype=float32"]) == 0
    assert not (runs / "eval/attention_maps.svg").exists()
    assert evaluate([*asked, "maps=2", "dtype=float32"]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(line for line in printed if line[:4] == ["attention", "weight", "at", "distance"])
    assert header[4:] == ["0", "1", "2-3", "4-7", "8-15", "keys", "for", "90", "%"]
    even = next(line for line in printed if line[:3] == ["uniform", "over", "16"])
    expected = attention.uniform_readouts(16)
    assert even[4:] == [f"{x:.3f}" for x in [*expected["mass"], 0.9]]
    found = json.loads((runs / "rope/eval/attention.json").read_text())
    assert np.array(found["maps"]).shape == (3, 4, 16, 16)  # layers, heads, queries, keys
    picture = (runs / "eval/attention_maps.svg").read_text()
    assert picture.count("<image") >= 2 * 3 * 4
    assert "head 4" in picture
    write([runs / "rope", runs / "learned"])
    report = (runs / "rope/report.md").read_text()
    assert "### Attention by distance\n\n| attention weight at distance | 0 | 1 | 2-3 |" in report
    figures = {path.name for path in (runs / "rope/figures").iterdir()}
    assert {"attention_distance.svg", "attention_maps.svg"} <= figures


def test_a_prompt_is_in_the_cache_and_no_part_of_a_map(
    runs: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    start = ["tune=prompt", "tune.tokens=3", f"init_from={runs}/rope"]
    train_on(runs, tmp_path / "run", "pos=rope", "steps=1", *start)
    ask = [f"run={tmp_path}/run", "threads=1"]
    assert evaluate([*ask, "eval=decode", "contexts=[12]", "tokens=4", "batch_sizes=[1]"]) == 0
    with pytest.raises(ValueError, match="a prompt or a prefix"):
        evaluate([*ask, "eval=attention"])


def test_windows_of_a_model_with_latents_are_as_far_apart_as_it_predicts(
    runs: Path, tmp_path: Path
) -> None:
    train_on(runs, tmp_path / "run", "pos=rope", "steps=1", "model.latents=4")
    ask = [f"run={tmp_path}/run", "threads=1"]
    assert evaluate([*ask, "eval=length", "contexts=[1]"]) == 0
    found = json.loads((tmp_path / "run/eval/length.json").read_text())
    (row,) = found["rows"]
    assert row["windows"] == 1 + math.ceil((found["tokens"] - 16) / 4)
    assert found["positions"] == {}  # by place in a window they would be of its end alone
    assert evaluate(ask) == 0
    (path,) = (tmp_path / "run/eval").glob("val_*.json")
    assert json.loads(path.read_text())["stride"] == 4


def test_runs_may_be_named_from_here_and_from_the_root(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs)
    ask = [f"run=rope,{runs}/learned", "threads=1", "eval=length", "contexts=[1]", "scalings=[]"]
    assert evaluate(ask) == 0
    assert (runs / "eval/length.md").exists()
    (runs / "eval/length.md").unlink()
    monkeypatch.chdir(runs / "rope")  # names with `..` have no common beginning
    assert evaluate(["run=.,../learned", *ask[1:]]) == 0
    assert (runs / "eval/length.md").exists()
    assert not (runs / "rope/eval/length.md").exists()


def test_answers_of_an_evaluation_with_other_settings_stay(runs: Path) -> None:
    before = {*(runs / "rope/eval").glob("val_*.json")}
    for more in ([], ["bigram=true"], [f"reference={runs}/learned"]):
        assert evaluate([f"run={runs}/rope", "threads=1", "split=val", "stride=7", *more]) == 0
    assert len({*(runs / "rope/eval").glob("val_*.json")} - before) == 3


def test_runs_in_several_dtypes_are_not_timed_in_one(runs: Path, tmp_path: Path) -> None:
    for dtype in ("float32", "bfloat16"):
        train_on(runs, tmp_path / dtype, "pos=rope", "steps=1", f"dtype={dtype}")
    ask = [f"run={tmp_path}/float32,{tmp_path}/bfloat16", "threads=1", "eval=decode"]
    with pytest.raises(ValueError, match="runs in bfloat16, float32, .* give dtype=bfloat16"):
        evaluate([*ask, "contexts=[8]", "tokens=4", "batch_sizes=[1]"])


def test_answers_of_earlier_versions_have_no_distances() -> None:
    old = {"layers": [{"distance": [1.0], "entropy": [1.0], "first": [0.1], "induction": [0.1]}]}
    run: Any = SimpleNamespace(done=True, seed=0, answer=lambda kind: old)
    study: Any = SimpleNamespace(variants=[Variant({"pos": "rope"}, [run])])
    for kind in ("attention_distance", "attention_maps"):
        shown = evaluations.evaluation(kind, study)
        assert len(shown.table(study)) <= 1
        assert shown.draw(study, {}) is None


def test_reading_attention_leaves_the_model_as_it_was(runs: Path) -> None:
    run, text = opened(runs / "rope"), tokens(2, 16)
    with torch.no_grad():
        expected = run.model(text)
        attention.head_readouts(run, text)
        assert torch.equal(run.model(text), expected)
    assert not any(layer._forward_pre_hooks for layer in run.model.attention_layers)


def test_a_sample_streams_what_it_prints_whole(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"run={runs}/bytes", "prompt=é", "max_new_tokens=40", "temperature=3", "threads=1"]
    assert sample(asked) == 0
    alone = capsys.readouterr().out
    assert sample([*asked, "num_samples=2", "cache=false"]) == 0
    assert capsys.readouterr().out.split("-" * 40)[0] == alone
    assert alone.startswith("é")
    assert sample([*asked, "temperature=0", "repetition_penalty=5"]) == 0
    assert capsys.readouterr().out != alone


def test_a_prompt_that_does_not_fit_slides_or_is_refused(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = [f"run={runs}/learned", f"prompt={'def f(x): ' * 12}", "max_new_tokens=5", "threads=1"]
    assert sample(long) == 0
    with pytest.raises(ValueError, match="context_overflow=refuse: a prompt of"):
        sample([*long, "context_overflow=refuse"])
    with pytest.raises(ValueError, match="context=99 exceeds the limit of pos=learned: 16"):
        sample([*long, "context=99"])


def test_decoding_ends_with_the_end_of_a_text(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(runs / "rope")
    end = run.tokenizer.token_to_id(END_OF_TEXT)
    with torch.no_grad():
        run.model.head.weight.zero_()
        run.model.head.weight[end] = 1
    monkeypatch.setattr(RunSelector, "load", lambda *_: run)
    monkeypatch.setattr("model.transformer.Transformer.forward", always(end))
    assert sample([f"run={runs}/rope", "prompt=x", "max_new_tokens=50", "temperature=0"]) == 0
    assert capsys.readouterr().out == f"x{END_OF_TEXT}\n"


def always(token: int) -> Callable[..., Tensor]:
    """A model that is sure of its next token."""
    return lambda model, tokens, *_, **__: torch.eye(model.shape.vocab_size)[token].expand(
        len(tokens), 1, -1
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["run={runs}"], "is not a run"),
        (["run={runs}/documents.jsonl"], "is not a run"),
        (["run={runs}/nowhere", "eval=length"], "nowhere is no folder"),
        (["run={runs}/rope,{runs}/learned"], "expected one run, got 2"),
        (["run={runs}/rope,", "eval=length"], "empty name between commas"),
        (["run={runs}/learned", "context=17"], "context=17 exceeds the limit of pos=learned: 16"),
        (["run={runs}/rope", "stride=17"], "stride=17 must be at least 1 and at most context=16"),
        (["run={runs}/rope", "split=test"], "split=test"),
        (["run={runs}/rope", "split=all"], "split=all: no such choice"),
        (["run={runs}/rope", "checkpoint=77"], "step_000077"),
        (["run={runs}/rope", "eval=speed"], "eval=speed: no such choice"),
        (["run={runs}/rope", "contexts=[1]"], "contexts: no such key"),
        (["run={runs}/rope", "eval=length", "contexts=[]"], "contexts="),
        (["run={runs}/rope", "eval=length", "contexts=[a]"], "contexts=a is not a finite number"),
        (["run={runs}/rope", "eval=length", "scalings=[rope_x]"], "scalings=rope_x"),
        (["run={runs}/rope", "eval=decode", "contexts=[8]"], r"contexts=\[8\] must be above"),
        (["run={runs}/rope", "eval=decode", "batch_sizes=[0]"], "batch_sizes="),
        (["run={runs}/rope", "eval=attention", "maps=-1"], "maps=-1 must be at least 0"),
        (
            ["run={runs}/rope", "eval=attention", "maps=17"],
            "maps=17 must be at most num_windows=16",
        ),
        (["run={runs}/rope", "reference={runs}/cache"], "is not a run"),
        (["run={runs}/rope", "eval=decode", "data.path={runs}/documents.jsonl"], "of its own"),
        (["run={runs}/rope", "eval=answers", "data.path={runs}/documents.jsonl"], "of its own"),
        (["run={runs}/rope", "data.path={runs}/nothing.txt"], "no such file"),
    ],
)
def test_what_cannot_be_asked_is_refused(runs: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate([override.format(runs=runs) for override in overrides])


def test_a_run_whose_files_do_not_belong_together_is_refused(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs / "rope", run)
    shutil.copy(runs / "bytes/tokenizer.json", run)
    with pytest.raises(ValueError, match="tokenizer.json is not the tokenizer of training"):
        evaluate([f"run={run}"])
    shutil.copy(runs / "rope/tokenizer.json", run)
    for weights in run.glob("checkpoints/*/model.safetensors"):
        weights.write_bytes(b"\x80\x04K\x01.")  # a pickle of 1
    with pytest.raises(ValueError, match="is damaged"):
        evaluate([f"run={run}"])
    assert decode.Options(batch_sizes=[1], contexts=[9], tokens=4, repeats=2)


def test_without_lm_eval_one_line_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "compare.evaluate.harness", raising=False)
    for name in ["lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    assert run_command(evaluate, ["run=none", "eval=harness", "tasks=any"]) == 2
    needed = "error: eval=harness needs lm-eval: pip install -e '.[harness]'\n"
    assert capsys.readouterr() == ("", needed)


@pytest.mark.parametrize("where", ["top_k", "ranks/top_k"])
def test_two_files_are_a_new_evaluation_with_its_table_and_figure(
    runs: Path,
    tmp_path: Path,
    where: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example of the package's docstring; no other file knows of it."""
    example = r"top_k\.(?:py|yaml):\n\n((?:(?: {4}.*)?\n)+)"
    module, yaml = map(textwrap.dedent, re.findall(example, package.__doc__ or ""))
    shutil.copytree(CONFIGS, tmp_path / "configs")
    for folder in (tmp_path, tmp_path / "configs/eval"):
        (folder / where).parent.mkdir(exist_ok=True)
    (tmp_path / f"configs/eval/{where}.yaml").write_text(yaml)
    (tmp_path / f"{where}.py").write_text(module)
    monkeypatch.setattr("train.config.compose.CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    two = f"{runs}/rope,{runs}/learned"
    assert (
        evaluate([f"run={two}", f"eval={where}", "ks=[1,300]", "dtype=float32", "threads=1"]) == 0
    )
    rows = json.loads((runs / "rope/eval/top_k.json").read_text())["rows"]
    assert rows[0]["accuracy"] < rows[1]["accuracy"] == 1
    assert capsys.readouterr().out.split()[:3] == ["variant", "k", "accuracy"]
    assert "| learned | 300 | 1 |" in (runs / "eval/top_k.md").read_text()
    assert (runs / "eval/top_k.svg").exists()
    write([runs / "rope", runs / "learned"])
    report = (runs / "rope/report.md").read_text()
    assert "### Top-k accuracy\n\n| variant | k | accuracy |" in report
    assert "Top-k accuracy: accuracy by k." in report
    assert (runs / "rope/figures/top_k.svg").exists()
    with pytest.raises(ValueError, match="ks=x is not a list"):
        evaluate([f"run={two}", f"eval={where}", "ks=x"])


def test_a_new_evaluation_shows_means_over_seeds() -> None:
    rows: list[Answer] = [{"k": 1, "x": 0.5, "y": None}, {"k": 1, "x": 1.5, "y": None}]
    variant = SimpleNamespace(label="rope", answers=lambda kind: [{"rows": [row]} for row in rows])
    study: Any = SimpleNamespace(variants=[variant])
    header, line = evaluations.evaluation("new", study).table(study)
    assert header == ["variant", "k", "x", "y"]
    assert line == ["rope", "1", "1 (-5.353 to 7.353)", "not defined"]


def test_old_keys_are_understood_with_a_line_of_notice(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"run={runs}/rope", "threads=1"]
    assert evaluate([*asked, f"against={runs}/rope"]) == 0
    found = capsys.readouterr()
    assert found.err == "note: against=... is now reference=...\n"
    assert "reference" in json.loads(Path(found.out.split("written: ")[1].strip()).read_text())
    assert evaluate([*asked, "eval=attention", "rows=1"]) == 0
    assert sample([*asked, "tokens=2", "count=2", "overflow=slide"]) == 0
    keys = ["rows", "num_windows", "tokens", "max_new_tokens", "count", "num_samples"]
    said = re.findall(r"(\w+)=\.\.\.", capsys.readouterr().err)
    assert said == [*keys, "overflow", "context_overflow"]


def test_environment_variables_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHANGED", "before")
    before = dict(os.environ)
    with environment_variables(CHANGED="inside", ADDED="inside"):
        assert (os.environ["CHANGED"], os.environ["ADDED"]) == ("inside", "inside")
        os.environ["BY_A_LIBRARY"] = "inside"
    assert os.environ == before
