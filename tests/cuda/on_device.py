"""What must hold on a GPU. `make test-gpu` asks a real one, test_pretended.py the pretended one."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import pytest
import torch
from tiny import RUN, tokens
from torch._subclasses.fake_tensor import FakeTensorMode

from cli.evaluate import evaluate
from compare.check.properties import (
    TinyVariant,
    cache_bytes,
    causality,
    decoding,
    gradients,
    training,
)
from model.attention.kernel import capability as real_capability
from model.cost import training_kernels
from model.loss import next_token_loss
from train.config.compose import compose
from train.measure.device import Device, fastest_dtype, select_device
from train.parallel.ranks import Ranks
from train.record.run_log import records
from train.run import run_training
from train.setup.build import build_model
from train.setup.run_setup import assemble, check
from train.step import NonFinite, TrainStep
from train.sweep.plan import plan_cells
from train.trainer import Trainer

if TYPE_CHECKING:
    from pretended import Machine

DEVICE = getattr(sys.modules.get("pretended"), "DEVICE", "cuda")  # or mps, for some of the tests
VARIANTS = [
    ("mha", "learned"),
    ("gqa", "rope"),
    ("mqa", "alibi"),
    ("sliding", "t5"),
    ("mla", "rope"),
    ("pattern", "pattern"),
    ("gated_delta", "none"),
    ("lstm", "learned"),
    ("blind", "gaussian"),
    ("sink", "rope_yarn"),
]


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The config of a tiny run on the device."""

    def make(*overrides: str) -> dict[str, Any]:
        places = [f"data.path={text}", f"data.cache={tmp_path}/cache", f"out={tmp_path}/run"]
        return compose([*RUN, *places, f"device={DEVICE}", "dtype=float32", *overrides])

    return make


@pytest.mark.parametrize(("attn", "pos"), VARIANTS)
def test_a_run_has_the_losses_of_the_cpu(
    attn: str, pos: str, tiny: Any, tmp_path: Path, machine: "Machine | None"
) -> None:
    """Training, validation, checkpoints, the sample and all that is measured."""
    found = {}
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        ask = (f"attn={attn}", f"pos={pos}", f"device={device}", f"out={out}", "steps=4")
        assert run_training(tiny(*ask)) == 0
        found[device] = [r["loss"] for r in records(out / "metrics.jsonl")]
        missing = [
            key for key, value in json.loads((out / "summary.json").read_text()).items()
            if value is None and key in ("kv_cache_bytes_per_token", "attention_ms", "step_ms")
        ]  # fmt: skip
        assert not missing
    assert found[DEVICE] == pytest.approx(found["cpu"], rel=1e-5)
    samples = [(tmp_path / device / "sample.txt").read_text() for device in ("cpu", DEVICE)]
    assert samples[0] == samples[1]


@pytest.mark.parametrize("overrides", [[], ["accumulate=2"], ["model.dropout=0.1"]])
def test_a_training_step_waits_for_the_device_once(
    overrides: list[str], tiny: Any, machine: "Machine | None"
) -> None:
    step = TrainStep.of_job(assemble(check(tiny("attn=gqa", "pos=rope", *overrides))))
    step(0)
    if machine:
        machine.forget()
        step(1)
        assert sum(machine.waits.values()) == 1, machine.waits
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as waits:
            step(1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]


def test_a_step_that_is_not_finite_changes_nothing(tiny: Any, machine: "Machine | None") -> None:
    step = TrainStep.of_job(assemble(check(tiny("attn=gqa", "pos=rope"))))
    step(0)
    before = [p.detach().cpu().clone() for p in step.model.parameters()]
    real = next_token_loss
    with (
        patch("train.step.next_token_loss", lambda *args: real(*args) * float("inf")),
        pytest.raises(NonFinite),
    ):
        step(1)
    after = [p.detach().cpu() for p in step.model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_float16_scales_its_loss_and_resumes_the_scale(
    tiny: Any, tmp_path: Path, machine: "Machine | None"
) -> None:
    """Steps whose gradients overflow change nothing but the scale, and are recorded."""
    with (
        patch("train.optim.loss_scale.LossScale.START", 2.0**27),
        patch("train.optim.loss_scale.LossScale.INTERVAL", 3),
    ):
        for out, steps in (("whole", 14), ("parts", 7), ("parts", 14)):
            asked = tiny("dtype=float16", "attn=gqa", "pos=rope", f"out={tmp_path}/{out}",
                         f"steps={steps}", "optim.schedule=constant", "resume=true",
                         "eval_every=null", "save_every=null")  # fmt: skip
            assert run_training(asked) == 0
    whole, parts = (
        [r for r in records(tmp_path / out / "metrics.jsonl") if r["split"] == "train"]
        for out in ("whole", "parts")
    )
    skipped = [r["step"] for r in whole if r["grad_norm"] is None]
    assert skipped[:3] == [1, 2, 3]  # too large a scale at first: halved each time
    expected, finite = 2.0**27, 0
    for record in whole:
        assert record["loss_scale"] == expected
        finite = 0 if record["grad_norm"] is None else finite + 1
        if record["grad_norm"] is None or finite == 3:
            expected, finite = expected * (2 if finite else 0.5), 0
    assert [(r["loss"], r["loss_scale"]) for r in parts] == (
        [(r["loss"], r["loss_scale"]) for r in whole]
    )
    assert len(skipped) < 14


def test_float16_has_nearly_the_losses_of_float32(
    tiny: Any, tmp_path: Path, machine: "Machine | None"
) -> None:
    """With the logits in pieces too, whose gradients are made before the scale is known."""
    found = {}
    for dtype, pieces in (("float32", 2**25), ("float16", 2**25), ("float16", 512)):
        with patch("model.loss.LOGITS", pieces):
            out = tmp_path / f"{dtype}-{pieces}"
            asked = tiny(f"dtype={dtype}", "attn=gqa", "pos=alibi", f"out={out}", "steps=6")
            assert run_training(asked) == 0
        found[out.name] = [r["loss"] for r in records(out / "metrics.jsonl")]
    exact, *half = found.values()
    for losses in half:
        assert losses == pytest.approx(exact, abs=0.01)
        assert losses != exact


def test_float16_is_what_a_gpu_without_bfloat16_takes() -> None:
    for there, expected in (((7, 5), "float16"), ((6, 1), "float32"), ((8, 9), "bfloat16")):
        with patch("train.measure.device.capability", lambda there=there: there):
            assert fastest_dtype("cuda") == expected


CAPABILITIES = [(7, 5), (8, 0), (9, 0)]
TRACES = {"flash": "flash", "efficient": "fmha", "cudnn": "cudnn"}  # in the names of real kernels


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("attn", "pos"), [
    ("mha", "rope"), ("gqa", "none"), ("mqa", "alibi"), ("gqa", "t5"), ("sliding", "rope"), ("sliding", "none"),
    ("mla", "rope"), ("pattern", "pattern"), ("rank", "rope"), ("forgetting", "none"),
])  # fmt: skip
def test_the_kernel_that_is_named_is_the_one_that_trains(
    attn: str, pos: str, dtype: str, capability: tuple[int, int],
    machine: "Machine | None",
) -> None:  # fmt: skip
    if not machine and capability != real_capability():
        pytest.skip(f"this GPU has another compute capability than {capability}")
    if dtype == "bfloat16" and capability < (8, 0):
        with pytest.raises(
            ValueError, match="compute capability 7.5, has no bfloat16; float16 and float32 work"
        ):
            select_device("cuda", dtype)
        return
    dropout = 0.1 if pos == "rope" else 0.0
    overrides = (f"model.dropout={dropout}", "model.max_len=80")
    variant = TinyVariant(attn, pos, select_device("cuda", dtype), overrides=overrides)
    model, x = variant.model().train(), tokens(2, 81).to("cuda")
    said = training_kernels(model, "cuda", variant.device.dtype, 80)

    def step() -> None:
        with variant.device.autocast():
            next_token_loss(model, x[:, :-1], x[:, 1:]).backward()

    if machine:
        machine.forget()
        step()
        assert set(machine.kernels) == set(said), machine.kernels
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    names = " ".join(event.key for event in profile.key_averages())
    for kernel, trace in TRACES.items():
        assert (trace in names) == (kernel in said), (kernel, said, names)


@pytest.mark.parametrize("asked", ["flash", "cudnn", "efficient", "math", "matmul"])
def test_the_kernel_that_is_asked_for_is_the_one_that_trains(
    asked: str, machine: "Machine | None"
) -> None:
    device = Device("cuda", torch.bfloat16)
    model = TinyVariant("gqa", "rope", device, overrides=(f"kernel={asked}",)).model().train()
    assert set(training_kernels(model, "cuda", device.dtype, 16)) == {asked}
    if machine:
        with device.autocast():
            model(tokens(2, 16).to("cuda")).float().sum().backward()
        assert set(machine.kernels) == ({asked} - {"matmul"})


@pytest.mark.parametrize(
    "variant",
    ["attn=gqa pos=alibi", "attn=mha pos=t5", "attn=sliding pos=rope attn.window=5"],
)
def test_a_compiled_model_trains_by_flex(variant: str, tiny: Any, tmp_path: Path) -> None:
    shape = ("model.dim=64", "model.n_heads=2", *variant.split())
    losses = []
    for kernel in ("flex", "matmul"):
        out = f"out={tmp_path}/{kernel}"
        assert run_training(tiny(*shape, "compile=true", f"kernel={kernel}", out)) == 0
        summary = json.loads((tmp_path / kernel / "summary.json").read_text())
        assert summary["kernel"] == kernel
        losses.append(summary["val_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_checkpoints_come_by_time(
    tiny: Any, tmp_path: Path, machine: "Machine | None", monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every five minutes, where a step takes 100 seconds."""
    seconds, train_step = 0.0, Trainer.train_step

    def slow(trainer: Trainer, warm: bool) -> None:
        nonlocal seconds
        train_step(trainer, warm)
        seconds += 100.0

    monkeypatch.setattr(Trainer, "train_step", slow)
    monkeypatch.setattr("train.trainer.perf_counter", lambda: seconds)
    assert run_training(tiny("save_every=auto", "steps=7", "eval_every=null", "keep=9")) == 0
    found = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert found == [f"step_{step:06d}" for step in (3, 6, 7)]


def test_processes_ask_each_other_once_a_step(
    tiny: Any, machine: "Machine | None", monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checkpoints by time too."""
    events, train_step, most = list[str](), Trainer.train_step, Ranks.most

    def step(trainer: Trainer, warm: bool) -> None:
        events.append("step")
        train_step(trainer, warm)

    def ask(ranks: Ranks, numbers: list[int]) -> list[int]:
        events.append("ask")
        return most(ranks, numbers)

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.setattr(Ranks, "most", ask)
    assert run_training(tiny("save_every=auto", "steps=4", "eval_every=null")) == 0
    assert events[:8] == ["step", "ask"] * 4
    assert events[8:] == ["ask", "ask"]  # for the peaks of memory, once in a run


@pytest.mark.parametrize(
    ("dtype", "ask", "found"),
    [
        ("bfloat16", ["attn=mha pos=rope", "attn=lstm pos=learned"], ["flash", "auto"]),
        ("bfloat16", ["attn=mha pos=rope", "attn=gqa pos=alibi"], ["efficient", "efficient"]),
        ("bfloat16", ["attn=mha kernel=fastest", "attn=gqa pos=alibi"], ["fastest", "efficient"]),
        ("float32", ["attn=mha pos=rope", "attn=additive pos=none"], ["efficient", "auto"]),
    ],
)
def test_the_runs_of_a_sweep_have_one_kernel(
    dtype: str, ask: list[str], found: list[str], text: Path, tmp_path: Path,
    machine: "Machine | None",
) -> None:  # fmt: skip
    places = [f"data.path={text}", f"data.cache={tmp_path}/cache", "device=cuda", f"dtype={dtype}"]
    cells = [[*RUN, *places, *cell.split()] for cell in ask]
    planned = plan_cells(cells, compose(cells[0]), tmp_path)
    assert [cell.config["kernel"] for cell in planned] == found
    for cell in planned:
        assert compose(cell.overrides)["kernel"] == cell.config["kernel"]


def test_the_window_of_a_sliding_one_is_in_the_kernel(machine: "Machine | None") -> None:
    """A step launches no more than 1.2 times the kernels of full attention, and computes the same."""
    device, launched, logits = Device("cuda", torch.bfloat16), {}, {}
    shape = ("model.max_len=512", "model.dim=64")
    for attn, window in (("gqa", ()), ("sliding", ("attn.window=100",))):
        variant = TinyVariant(
            attn, "rope", device, overrides=(*shape, "attn.n_kv_heads=2", *window)
        )
        model, x = variant.model(spread=2.0).train(), variant.tokens(2, 512)
        if machine:
            machine.forget()
        with device.autocast():
            logits[attn] = model(x)
            next_token_loss(model, x[:, :-1], x[:, 1:]).backward()
        if machine:
            launched[attn] = machine.launches
            assert set(machine.kernels) == {"flash"}
    on_cpu = replace(variant, device=Device("cpu", torch.bfloat16))
    with on_cpu.device.autocast():
        expected = on_cpu.model(spread=2.0)(x.cpu())
    variant.require_close(logits["sliding"].cpu(), expected, "with the window in the kernel")
    if machine:
        assert launched["sliding"] <= 1.2 * launched["gqa"]


@pytest.mark.parametrize(("attn", "pos"), [VARIANTS[n] for n in (1, 3, 6)])
def test_the_properties_of_a_variant_hold(attn: str, pos: str, machine: "Machine | None") -> None:
    for holds in (causality, gradients, decoding, cache_bytes, training):
        holds(TinyVariant(attn, pos, Device(DEVICE, torch.float32)))


def test_evaluations_work(
    tiny: Any, tmp_path: Path, machine: "Machine | None", capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_training(tiny("attn=gqa", "pos=rope")) == 0
    for ask in (
        ["eval=perplexity"],
        ["eval=attention", "num_windows=1"],
        ["eval=decode", "contexts=[16]", "batch_sizes=[2]", "tokens=4", "repeats=2"],
    ):
        assert evaluate([f"run={tmp_path}/run", *ask]) == 0, capsys.readouterr().err
    decoded = json.loads((tmp_path / "run/eval/decode.json").read_text())
    assert all(0 < row["launch_share"] <= 1.5 for row in decoded["rows"])


def test_questions_are_answered(
    tiny: Any, tmp_path: Path, machine: "Machine | None", capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["data=people", "data.part=questions", "data.people=40", "objective=answers", "steps=2"]
    places = [f"data.cache={tmp_path}/cache", f"out={tmp_path}/run", f"device={DEVICE}"]
    of_run = [o for o in RUN if not o.startswith(("data", "device"))]
    assert run_training(compose([*of_run, *places, *ask, "model.max_len=40"])) == 0
    assert evaluate([f"run={tmp_path}/run", "eval=answers"]) == 0, capsys.readouterr().err


def test_a_resumed_run_equals_an_uninterrupted_one(
    tiny: Any, tmp_path: Path, machine: "Machine | None"
) -> None:
    for out, steps in (("whole", 8), ("parts", 4), ("parts", 8)):
        asked = tiny("model.dropout=0.1", f"out={tmp_path}/{out}", f"steps={steps}",
                     "optim.schedule=constant", "resume=true")  # fmt: skip
        assert run_training(asked) == 0
    whole, parts = (
        {
            r["step"]: r["loss"]
            for r in records(tmp_path / out / "metrics.jsonl")
            if r["split"] == "train"
        }
        for out in ("whole", "parts")
    )
    # Attention's backward pass on a real GPU adds up in any order.
    assert parts == (whole if machine else pytest.approx(whole, rel=1e-4))


@pytest.mark.parametrize("pos", ["learned", "rope"])
@pytest.mark.parametrize("feedforward", ["gelu", "relu2"])
def test_what_a_block_keeps_is_in_half_precision(
    pos: str, feedforward: str, machine: "Machine | None"
) -> None:
    """CUDA's autocast has a list of operations that it computes in float32: norms, squares.

    RMSNorm is one kernel there, which the pretended GPU takes apart.
    """
    device, wide = Device("cuda", torch.bfloat16), list[torch.Size]()
    overrides = (f"model.feedforward={feedforward}", "kernel=matmul")
    model = TinyVariant("gqa", pos, device, overrides=overrides).model().train()

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float32 and x.dim() == 3 and x.size(-1) > 1:
            wide.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), device.autocast():
        model.hidden(tokens(2, 16).to("cuda"))
    assert not wide


@pytest.mark.parametrize(
    ("model", "rows", "most"),
    [
        (["model=gpt2", "attn=mha", "pos=learned"], 8, 2485),  # 3,072 with norms in float32
        (["model=shakespeare", "attn=gqa", "pos=rope"], 64, 1241),  # 1,540
        (
            ["model=shakespeare", "model.feedforward=relu2", "attn=gqa", "pos=rope"],
            64,
            1241,
        ),  # 2,116
    ],
    ids=["gpt2", "shakespeare", "relu2"],
)
def test_what_blocks_keep_for_the_backward_pass(model: list[str], rows: int, most: int) -> None:
    """MiB, exact: on tensors without storage, so of the whole size."""
    plugin = sys.modules.get("pretended")
    if plugin is None:
        pytest.skip("a real GPU has no tensors without storage: plan=true counts them there")
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        kept[storage._cdata] = storage.nbytes(), x
        return x

    def flash(q: Any, k: Any, v: Any, mask: Any, **options: Any) -> Any:
        flash_attention = torch.ops.aten._scaled_dot_product_flash_attention
        causal = options["is_causal"]
        return flash_attention(q, k, v, 0.0, causal, False, scale=options["scale"])[0]

    config = compose([*model, "data.path=README.md"])
    with (
        plugin.patched(plugin.Machine((8, 0))),
        FakeTensorMode(),
        patch("torch.nn.functional.scaled_dot_product_attention", flash),
    ):
        with torch.device("cuda"):
            made = build_model(config, 50257)
            text = torch.zeros(rows, made.shape.max_len, dtype=torch.int64)
        own = {p.untyped_storage()._cdata for p in made.parameters()}
        keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x)
        with keeping, torch.autocast("cuda", torch.bfloat16):
            made.hidden(text)
    size = sum(n for storage, (n, _) in kept.items() if storage not in own)
    assert most - 1 < size / 2**20 < most
