"""The tests of on_device.py on a pretended GPU, in processes of their own: it comes before torch."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
REAL = {"test_a_compiled_model_trains_by_flex"}  # a pretended GPU cannot compile
TESTS = [
    node.name
    for node in ast.parse((HERE / "on_device.py").read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and node.name not in REAL
]
HALF = len(TESTS) // 2  # a process each: to begin one costs seconds

#: What does not depend on a kernel or a capability of CUDA's.
ON_MPS = [
    "test_a_run_has_the_losses_of_the_cpu", "test_the_properties_of_a_variant_hold",
    "test_evaluations_work", "test_a_resumed_run_equals_an_uninterrupted_one",
    "test_questions_are_answered",
]  # fmt: skip


@pytest.mark.skipif(shutil.which("g++") is None, reason="the pretended GPU needs g++")
@pytest.mark.parametrize(
    ("device", "tests"),
    [("cuda", TESTS[:HALF]), ("cuda", TESTS[HALF:]), ("mps", ON_MPS)],
    ids=["cuda, first half", "cuda, second half", "mps"],
)
def test_on_a_pretended_gpu(device: str, tests: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "pretended", "-o"]
    command += ["pythonpath=. tests tests/cuda"]
    command += [f"{HERE / 'on_device.py'}::{test}" for test in tests]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parents[1], check=False,
        env={**os.environ, "PRETENDED_DEVICE": device},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1]
