"""The benchmark compares like with like, whatever another package does."""

import json
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tokens
from torch import nn

from bench import op_breakdown, peers, step_time
from bench.peers import PEERS, installed
from compare.check.properties import TINY, VOCAB
from model.cost import count_parameters, flops_per_token
from model.shape import Shape
from train.config.compose import compose
from train.measure.device import Device
from train.step import TrainStep
from train.step_estimate import random_token_step

TEXT = ["data.path=README.md"]  # never read
CPU = Device("cpu", torch.float32)


def step(*overrides: str) -> TrainStep:
    return random_token_step(
        compose([*TINY, *TEXT, *step_time.SAME, "batch_size=2", "dtype=float32", *overrides]), VOCAB
    )


class Here(Executor):
    """The peers' process, in this one."""

    def __init__(self, overrides: list[str]) -> None:
        step_time._peers = step_time.PeerBenchmarks(overrides)

    def submit(self, act: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(act(*arguments))
        return future


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[str]]:
    """The command at a tiny shape, writing into a temporary folder; returns the names of its rows."""
    monkeypatch.setattr(step_time, "WORKS", {"tiny": [*TINY, *TEXT, "batch_size=2"]})
    monkeypatch.setattr(step_time, "OUTPUT", tmp_path / "bench")
    monkeypatch.setattr(step_time.devices, "set_up_process", lambda threads, tf32: None)
    monkeypatch.setattr(step_time, "peer_process", Here)

    def run(*arguments: str) -> list[str]:
        assert step_time.main(["work=tiny", "rounds=2", *arguments]) == 0
        rows = json.loads((tmp_path / "bench/speed.json").read_text())["works"]["tiny"]
        assert (tmp_path / "bench/speed.md").read_text().startswith(step_time.NOTE)
        for row in rows:
            assert row["step_ms"] > 0
            assert row["peak_bytes"] > 0
            assert row["times_ours"][row["dtype"]][0] <= row["times_ours"][row["dtype"]][2]
        return [row["name"] for row in rows]

    return run


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_has_our_size_and_is_causal(name: str) -> None:
    if name not in installed(0.0):
        pytest.skip(
            f"{name} is not installed; litgpt's pins exclude ours, others are peers' extras"
        )
    mine = step("model.dim=192", "model.n_heads=6", "model.max_len=64").model
    theirs = PEERS[name](mine.shape).eval()
    size = sum(p.numel() for p in theirs.parameters())
    assert size == pytest.approx(count_parameters(mine)[0], rel=0.03)
    x = tokens(2, 16) % mine.shape.vocab_size
    changed = x.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % mine.shape.vocab_size
    with torch.no_grad():
        one, other = theirs(x), theirs(changed)
    assert one.shape == (2, 16, mine.shape.vocab_size)
    torch.testing.assert_close(one[:, :9], other[:, :9])
    assert not torch.allclose(one[:, 9:], other[:, 9:])


def test_a_benchmark_trains_and_counts_all_memory() -> None:
    made = step()
    before = [p.clone() for p in made.model.parameters()]
    benchmark = step_time.Benchmark(step_time.successive(made), made.model, made.optimizer)
    benchmark.step()
    assert not any(map(torch.equal, before, made.model.parameters()))
    held = sum(p.nbytes for p in made.model.parameters()) + made.optimizer.nbytes
    assert benchmark.peak_bytes() > held > 0


def test_a_peer_that_fails_is_reported_and_the_others_are_timed(
    quick: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(shape: Shape) -> nn.Module:
        raise RuntimeError("it has\nits reasons")

    found = {"transformers GPT-2": peers.gpt2, "broken": broken}
    monkeypatch.setattr(step_time, "installed", lambda dropout: found)
    monkeypatch.setattr(torch, "compile", lambda work, **options: work)  # takes half a minute
    names = quick("dtype=float32", "variants=false")
    assert names[0].startswith("ours, ")
    assert "transformers GPT-2, float32" in names
    assert not [name for name in names if name.startswith("broken")]
    said = capsys.readouterr()
    assert "broken, float32: RuntimeError: it has its reasons" in said.err
    assert "transformers GPT-2, float32" in said.out


def test_without_peers_only_ours_are_timed(
    quick: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda work, **options: work)
    names = quick("peers=false")
    assert {name.split(",")[0] for name in names} == {"ours"}
    for changed in ("attn=mqa", "attn=sliding attn.window=3", "memory=lean", "compile=true"):
        assert sum(name.endswith(f", {changed}") for name in names) == 1
    with pytest.raises(ValueError, match="work=huge"):
        step_time.main(["work=huge"])


def test_steps_are_interleaved_and_caches_warmed() -> None:
    order: list[str] = []
    steps = {name: (lambda name=name: order.append(name)) for name in "ab"}
    times = step_time.interleave(steps, CPU, rounds=2, warm_up=1)
    assert order == list("ababab")
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}
    order.clear()
    step_time.interleave(steps, CPU, rounds=1, warm_up=0, warm_caches=True)
    assert order == list("aabb")


def test_with_dropout_peers_that_have_none_are_left_out() -> None:
    assert set(installed(0.1)) == set(installed(0.0)) & set(peers.WITH_DROPOUT)


def test_the_parts_of_a_step_are_all_of_it() -> None:
    whole, steps = op_breakdown.measure(step("optim=muon"))
    model = step().model
    length = model.shape.max_len
    operations = steps[-1]
    products = [o for o in operations if o.kind.startswith(("products", "attention's"))]
    counted = flops_per_token(model, length, causal=False) * 2 * length
    assert sum(o.flops for o in products) == counted
    assert any(o.flops for o in operations if o.kind == op_breakdown.OPTIMIZER)  # Muon's own
    _, *lines, left, total = op_breakdown.table(whole, steps, 1e9)
    assert {o.kind for o in operations} == {line[0] for line in lines}
    assert len(operations) == sum(int(line[1].replace(",", "")) for line in lines)
    assert total[1] == f"{len(operations):,}"
    known = sum(float(line[2].replace(",", "")) for line in [*lines, left])
    assert known == pytest.approx(1e3 * whole, abs=0.1 * len(lines))


def test_the_parts_of_a_compiled_step_are_refused() -> None:
    with pytest.raises(ValueError, match="compile=false"):
        op_breakdown.main(["model=nano", "attn=mha", "pos=rope", "compile=true"])
