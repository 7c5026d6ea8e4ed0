"""Fixtures: text that is present everywhere, and the configs of tiny runs on it."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")

import gc
import json.decoder
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny import RUN

from cli.entry import run_command
from cli.train import train
from train.config.compose import compose
from train.config.schema import Config
from train.measure.timer import matmul_flops_per_second
from train.sweep.processes import Ended, folder_of, settle, stamp_of
from train.sweep.slots import Slot


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _frozen() -> None:
    """What is imported by now is left out of garbage collections: each run measured makes two."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _small_product() -> Iterator[None]:
    """Runs in this process measure a small matrix product as their ceiling: a large one takes longer."""
    with patch("train.summary.matmul_flops_per_second", partial(matmul_flops_per_second, size=64)):
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """Nothing in this process connects to another machine."""
    real = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        # The address of a Unix socket is a path.
        host = address[0] if isinstance(address, tuple) else "localhost"
        assert host in ("localhost", "127.0.0.1", "::1"), f"the suite connects to {address}"
        real(self, address)

    with patch("socket.socket.connect", connect):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 12 kB of real text: a module of the standard library."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(Path(json.decoder.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


@pytest.fixture
def config(text: Path, tmp_path: Path) -> Callable[..., Config]:
    """The config of a tiny run on that text, with overrides."""

    def make(*overrides: str) -> Config:
        places = [f"data.path={text}", f"data.cache={tmp_path}/cache", f"out={tmp_path}/run"]
        return compose([*RUN, *places, *overrides])

    return make


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of sweeps in the process of the test, and no probes of their speed."""

    def launch(runs: list[list[str]], slots: list[Slot], ended: Ended, start: object) -> None:
        for run in runs:
            folder = folder_of(run)
            before = stamp_of(folder)
            settle(folder, run_command(train, run), before)
            ended(folder)

    monkeypatch.setattr("train.sweep.run.launch_here", launch)
    monkeypatch.setattr("train.sweep.run.starting", lambda *_: nullcontext())
    monkeypatch.setattr("compare.cost.plan.probed", lambda models: [0.01] * len(models))
