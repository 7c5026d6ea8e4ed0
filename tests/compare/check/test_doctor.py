"""The self-check finds what is broken, and says so."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli import doctor as command
from cli.doctor import main
from compare.check import doctor
from compare.check.doctor import failures_of, matrix
from compare.check.properties import TinyVariant, require

ROOT = Path(__file__).resolve().parents[3]


def holds_for_rope(variant: TinyVariant) -> None:
    """Fails for others."""
    require(variant.pos == "rope", "no rope")


def crashes(variant: TinyVariant) -> None:
    """Never gets far."""
    raise RuntimeError("boom\nand more" if variant.pos == "rope" else "")


def test_failures_and_crashes_are_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROPERTIES", [holds_for_rope, crashes])
    good, bad = TinyVariant("mha", "rope"), TinyVariant("mha", "none")
    assert failures_of(good) == ["crashes: RuntimeError: boom"]
    assert failures_of(bad) == ["holds_for_rope: no rope", "crashes: RuntimeError: "]
    assert matrix({good: [], bad: ["a", "b"]}).split() == ["rope", "none", "mha", "ok", "2", "FAIL"]


def test_a_variant_that_fails_gives_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "compiler_fails", lambda variant: False)
    monkeypatch.setattr(doctor, "PROPERTIES", [holds_for_rope])
    monkeypatch.setattr(command, "check_all", lambda variants: map(failures_of, variants))
    assert main(["attn=mha,gqa", "pos=rope,none", "device=cpu"]) == 1
    printed = capsys.readouterr().out
    assert "attn=gqa pos=none holds_for_rope: no rope" in printed
    assert "2 variants fail" in printed
    assert main(["attn=mha", "pos=rope", "device=cpu"]) == 0


def test_choices_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean gqa"):
        main(["attn=gpa"])
    with pytest.raises(ValueError, match="n_kv_heads=3 must divide"):
        main(["attn=gqa", "attn.n_kv_heads=3", "pos=rope"])
    with pytest.raises(ValueError, match=r"model.n_layers: the doctor takes attn, pos"):
        main(["model.n_layers=1"])


def test_a_scheme_that_appears_is_tested_against_every_partner(tmp_path: Path) -> None:
    """The README's example, dropped into a copy of the project, and a broken attention beside it."""
    for name in (
        "model",
        "data",
        "train",
        "compare",
        "cli",
        "bench",
        "configs",
        "tests",
        "pyproject.toml",
    ):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    readme = (ROOT / "README.md").read_text()
    code, yaml = (
        re.search(rf"```{kind}\n(.*?)```", readme, re.DOTALL)[1] for kind in ("python", "yaml")
    )
    (tmp_path / "model/position/drift.py").write_text(code)
    (tmp_path / "configs/pos/drift.yaml").write_text(yaml)
    mqa = (tmp_path / "model/attention/grouped.py").read_text().split("class MHA")[0]
    peeking = mqa.replace("class GQA", "class Peek").replace(
        "values, positions.pos,", "values, positions.pos + 1,"
    )
    assert peeking.count("pos + 1") == 1
    (tmp_path / "model/attention/peek.py").write_text(peeking)
    (tmp_path / "configs/attn/peek.yaml").write_text(
        "_target_: model.attention.peek.Peek\nn_kv_heads: 2\nqk_norm: false\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-n0", "tests/model/test_variants.py",
         "-k", "(drift and mqa) or (peek and rope and not rope_)"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.findall(r"^(\w+)(?:\[(\w+)\])? \S+::(\S+)", done.stdout, re.MULTILINE)
    failed = {(holds, test) for word, holds, test in found if word == "SUBFAILED"}
    assert ("PASSED", "", "test_variant[mqa-drift]") in found, done.stdout
    assert ("PASSED", "", "test_bfloat16_stays_near_float32_and_trains[mqa-drift]") in found
    assert ("causality", "test_variant[peek-rope]") in failed
    assert {test for _, test in failed} == {"test_variant[peek-rope]"}
    (passed,) = re.findall(r"(\d+) subtests passed", done.stdout)
    assert int(passed) + len(failed) == 2 * 4  # those of every pair: neither is representative


def test_a_pattern_that_no_choice_matches_is_refused() -> None:
    with pytest.raises(ValueError, match="no variant: attn=glob"):
        main(["attn=glob(zzz*)"])
