"""The device of the tests of this folder: the pretended one if its plugin is loaded, else a real one."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pretended import Machine


@pytest.fixture
def capability() -> tuple[int, int]:
    """The compute capability to pretend."""
    return 8, 0


@pytest.fixture
def machine(capability: tuple[int, int]) -> "Iterator[Machine | None]":
    """The pretended machine; None on a real GPU."""
    if plugin := sys.modules.get("pretended"):
        with plugin.pretended(capability) as machine:
            yield machine
    elif torch.cuda.is_available():
        yield None
    else:
        pytest.skip("there is no GPU, and none is pretended (pytest -p pretended)")
