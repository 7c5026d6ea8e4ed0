"""The laboratory of attention scores: which ones fit an angle."""

from pathlib import Path

import pytest
import torch

from cli import lab as command
from compare.lab import scores
from model.attention.scores.additive import additive_scores


def test_dot_products_fit_an_angle_and_sums_without_a_bias_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"PAIRS": 400, "DIMS": (2, 3), "WIDTHS": (4, 8), "STEPS": 60}.items():
        monkeypatch.setattr(scores, name, value)
    monkeypatch.chdir(tmp_path)
    assert command.main(["scores"]) == 0
    _, *rows = (
        line.split("  ") for line in capsys.readouterr().out.partition("\n\n")[0].splitlines()
    )
    r2: dict[str, list[float]] = {}
    for row in rows:
        r2.setdefault(row[0], []).append(float(row[-1]))
    assert {name: len(found) for name, found in r2.items()} == {
        "scaled dot product": 2, "multiplicative": 2, "concatenated": 2,
        "additive": 4, "additive, with biases": 4,
    }  # fmt: skip
    assert min(*r2["scaled dot product"], *r2["multiplicative"]) > 0.999
    assert max(*r2["concatenated"], *r2["additive"]) < 0.05
    assert max(r2["additive, with biases"]) > 0.9
    picture = (tmp_path / "outputs/scores.svg").read_text()
    assert "held-out R²" in picture
    assert all(name in picture for name in r2)


def test_the_fitted_additive_score_is_that_of_the_model_and_odd_without_a_bias() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 7, 3)
    score = scores.Additive(3, 5, biased=False)
    keys, queries = k @ score.W_k.mT, q @ score.W_q.mT
    expected = additive_scores(queries[None, None], keys[None, None], score.w[None])[0, 0]
    torch.testing.assert_close(score(q, k), expected.diagonal())
    torch.testing.assert_close(score(-q, -k), -score(q, k))
    biased = scores.Additive(3, 5, biased=True)
    assert not torch.allclose(biased(-q, -k), -biased(q, k), atol=0.1)
