"""Selection of device and dtype, as far as it can be tested without a GPU."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cli import BUSY, QUIET
from compare.check.properties import composed
from train.config.compose import choices_of, compose
from train.config.keys import MISSING
from train.measure import device as devices
from train.measure.device import Device, select_device
from train.record.run_folder import open_config
from train.run import refuse_changes
from train.setup.run_setup import check

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(devices, "capability", lambda: (8, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.parametrize(
    ("device", "asked", "steps", "compiled"),
    [
        ("cuda", "auto", devices.COMPILE_PAYS_AFTER, True),
        ("cuda", "auto", devices.COMPILE_PAYS_AFTER - 1, False),
        ("cpu", "auto", 10 * devices.COMPILE_PAYS_AFTER, False),
        ("cuda", True, 1, True),
        ("cuda", False, 10**6, False),
    ],
)
@pytest.mark.usefixtures("with_cuda")
def test_auto_compiles_long_runs_on_cuda(
    device: str, asked: bool | str, steps: int, compiled: bool
) -> None:
    found = select_device(device, "auto", asked, steps)
    assert (found.name, found.compiled) == (device, compiled)


@pytest.mark.usefixtures("with_cuda")
def test_auto_compiles_nothing_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not select_device("cuda", "auto", "auto", 10**6).compiled


def test_a_wrong_compile_is_said() -> None:
    with pytest.raises(ValueError, match="compile=always: no such choice"):
        check(composed("data.path=README.md", "compile=always"))


@pytest.mark.parametrize(
    ("device", "parameters", "accumulate", "modes"),
    [
        (Device("cuda", torch.float32, compiled=True), 2, 1, ["reduce-overhead"]),
        (Device("cuda", torch.float32, compiled=True), 2, 2, [None]),
        (Device("cuda", torch.float32, compiled=True), devices.CUDA_GRAPH_BELOW, 1, [None]),
        (Device("cpu", torch.float32, compiled=True), 2, 1, [None]),
        (Device("cuda", torch.float32), 2, 1, []),
    ],
)
def test_a_small_model_on_cuda_becomes_one_graph(
    device: Device,
    parameters: int,
    accumulate: int,
    modes: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, mode=None: asked.append(mode))
    with torch.device("meta"):
        device.compile(nn.Linear(parameters, 1, bias=False), accumulate)
    assert asked == modes


def test_tf32_is_allowed_only_where_asked() -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        for asked in (True, False):
            devices.set_up_process(None, tf32=asked)
            assert torch.backends.cuda.matmul.allow_tf32 == asked
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_a_run_from_before_a_key_existed_can_be_resumed(tmp_path: Path) -> None:
    now = composed("data.path=README.md")
    old = {key: value for key, value in now.items() if key not in MISSING}
    (tmp_path / "config.json").write_text(json.dumps(old))
    before = open_config(tmp_path)
    refuse_changes(before, now)
    with pytest.raises(ValueError, match="tf32 changed from False to True"):
        refuse_changes(before, now | {"tf32": True})
    with pytest.raises(ValueError, match="tf32 changed from False to True"):
        refuse_changes(now, now | {"tf32": True})


def test_a_tiny_model_has_one_thread_whatever_its_variant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The count follows from the config alone, and is that of all variants that a sweep compares."""
    monkeypatch.setattr(devices, "ALL_THREADS", 8)

    def threads(*overrides: str) -> int:
        return check(compose(["data.path=README.md", "device=cpu", *overrides])).threads

    tiny = ["model.dim=32", "model.n_heads=4", "model.max_len=64"]
    assert devices.GRAIN == 32 * 64 * 16
    assert threads(*tiny, "batch_size=15") == 1
    assert threads(*tiny, "batch_size=16") == 8
    assert threads(*tiny, "batch_size=31", "accumulate=2") == 8
    assert threads(*tiny, "batch_size=30", "accumulate=2") == 1
    assert threads() == 8
    assert threads(*tiny, "batch_size=15", "threads=3") == threads("threads=3") == 3
    variants = [f"{group}={choice}" for group in ("attn", "pos") for choice in choices_of(group)]
    assert {threads(*tiny, "batch_size=15", variant) for variant in variants} == {1}
    assert devices.choose_threads(Device("cuda", torch.float32), 1) == 8


@pytest.mark.parametrize(("running", "spins"), [(1, QUIET), (999, BUSY), ("?", QUIET)])
def test_threads_spin_for_a_short_time_on_a_busy_machine(running: object, spins: str) -> None:
    """Set before torch is imported, since libgomp reads it once; unless the user has set either."""
    program = """
import importlib, os, pathlib, sys

load = f"0.5 0.5 0.5 {sys.argv.pop(1)}/1234 99"
pathlib.Path.read_text = lambda path, **_: load if str(path) == "/proc/loadavg" else ""

class Torch:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ImportError(f"spins: {os.environ.get('GOMP_SPINCOUNT')}")

sys.meta_path.insert(0, Torch())
for name in sys.argv[1:]:
    for module in [m for m in sys.modules if m.split(".")[0] in ("cli", "bench", "train", "compare")]:
        del sys.modules[module]
    for variable in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(variable, None)
    os.environ.update([setting.split("=") for setting in name.split(" ")[1:]])
    try:
        importlib.import_module(name.split(" ")[0])
    except ImportError as error:
        print(error)
"""
    commands = [f"cli.{p.stem}" for p in (ROOT / "cli").glob("*.py") if p.stem != "__init__"]
    commands += [f"bench.{p.stem}" for p in (ROOT / "bench").glob("*.py") if p.stem != "__init__"]
    own = ["cli.doctor GOMP_SPINCOUNT=7", "cli.doctor OMP_WAIT_POLICY=active"]
    command = [sys.executable, "-c", program, str(running), *commands, *own]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert said[-2:] == ["spins: 7", "spins: None"]
    assert set(said[:-2]) == {f"spins: {spins}"}
    assert len(said) > 8
