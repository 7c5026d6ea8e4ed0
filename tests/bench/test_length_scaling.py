"""One attention layer at growing lengths."""

from pathlib import Path

import pytest

from bench import length_scaling


def test_both_variants_are_measured_at_each_length_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(length_scaling, "LENGTHS", (16, 32))
    monkeypatch.setattr(length_scaling, "OUTPUT", tmp_path / "outputs/scaling.svg")
    monkeypatch.setattr(length_scaling.devices, "set_up_process", lambda threads, tf32: None)
    overrides = ["model.dim=32", "model.n_heads=4", "attn.n_kv_heads=2", "attn.window=4"]
    assert length_scaling.main(overrides) == 0
    head, first, second = [line.split() for line in capsys.readouterr().out.splitlines()[1:4]]
    assert head.count("sliding") == head.count("full") == 5
    assert first[0] == "16"
    assert second[0] == "32"
    assert len(second) == len(first) + 4  # growth factors
    picture = (tmp_path / "outputs/scaling.svg").read_text()
    assert "sliding" in picture
    assert "peak memory, MiB" in picture


def test_the_attention_is_not_a_choice() -> None:
    with pytest.raises(ValueError, match="attn is fixed"):
        length_scaling.main(["attn=mla"])
