"""Fixtures: text that is present everywhere, and the configs of tiny runs on it."""

import os

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_MODE="offline")

import json.decoder
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import RUN

from train.config import Config, compose


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


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
