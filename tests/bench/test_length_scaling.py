"""One attention layer at growing lengths."""

from pathlib import Path

import pytest

from bench import length_scaling
from compare.check.properties import CPU


@pytest.fixture
def picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The figure of a comparison at lengths 16 and 32, to be drawn."""
    monkeypatch.setattr(length_scaling, "LENGTHS", (16, 32))
    monkeypatch.setattr(length_scaling, "OUTPUT", tmp_path / "outputs/scaling.svg")
    monkeypatch.setattr(length_scaling.devices, "set_up_process", lambda threads, tf32: None)
    return tmp_path / "outputs/scaling.svg"


SMALL = ["model.dim=32", "model.n_heads=4", "device=cpu"]


def test_both_variants_are_measured_at_each_length_and_drawn(
    picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [*SMALL, "attn.n_kv_heads=2", "attn.window=4"]
    assert length_scaling.main(overrides) == 0
    head, first, second = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert head.count("sliding") == head.count("full") == 5
    assert first[0] == "16"
    assert second[0] == "32"
    assert len(second) == len(first) + 4  # growth factors
    assert "sliding" in picture.read_text()
    assert "peak memory, MiB" in picture.read_text()


def test_kernels_of_one_attention_are_compared_by_name(
    picture: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert length_scaling.main([*SMALL, "kernel=matmul,flash", "attn=gqa", "pos=rope"]) == 0
    head, first, _ = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert head.count("matmul") == head.count("flash") == 5
    assert [word for word in first if word.isalpha()] == ["matmul", "flash"]  # what computed
    assert "flash" in picture.read_text()


def test_the_plain_products_hold_the_scores_and_flash_does_not() -> None:
    """Peak bytes at twice the length: nearly four times, and less than three times."""
    growth = {}
    for kernel in ("matmul", "flash"):
        overrides = [*length_scaling.DEFAULTS, *SMALL, "attn=mha", f"kernel={kernel}"]
        peaks = [
            length_scaling.peak_bytes(length_scaling.layer_pass(overrides, n, CPU)[0], CPU)
            for n in (512, 1024)
        ]
        growth[kernel] = peaks[1] / peaks[0]
    assert growth["matmul"] > 3.5
    assert growth["flash"] < 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["kernel=matmul,flush"], "kernel=flush: no such choice; did you mean flash"),
        (["kernel=matmul,flash", "pos=t5"], "kernel=flash has no gradient for the bias of T5"),
        (["kernel=matmul,flex"], "kernel=flex is for compiled models"),
        (["kernel=matmul,flash", "model.dropout=0.1"], "kernel=flash has no dropout on a CPU"),
    ],
)
def test_kernels_that_cannot_be_had_are_refused(
    picture: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        length_scaling.main([*SMALL, *overrides])


def test_the_attention_is_not_a_choice() -> None:
    with pytest.raises(ValueError, match="attn is fixed"):
        length_scaling.main(["attn=mla"])
