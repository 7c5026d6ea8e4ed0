"""A difference persists, grows or fades with size, or nothing is said; no further than ten times the compute."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compare.check.calibration import ladder as simulated
from compare.report.analysis import Study, analyse_folders
from compare.report.curves.ladder import (
    ladder_conclusions,
    ladder_figure,
    ladder_table,
    ladders,
    percents,
)
from compare.report.curves.worth import worths
from compare.report.write import report
from compare.statistics.ladder import line_weights, predict, slope_weights, too_little, trends
from compare.statistics.paired import percent
from train.config.compose import compose

COMPUTE = np.array([1.0, 4.0, 16.0, 64.0])
SEEDS = np.array([[-1.0], [0.0], [1.0]])
NOISE = 0.002 * np.array([[1, -1, 0, 0.5], [0, 1, -1, 0.5], [-1, 0, 1, -1]])
FLAT, FALL = np.ones(4), np.array([1.0, 2 / 3, 1 / 3, 0.0])


def word_of(differences: Any) -> str:
    return trends([(COMPUTE, np.asarray(differences) + NOISE)])[0].word


def test_a_slope_is_a_doubling_and_a_line_goes_through_its_points() -> None:
    line = 0.3 + 0.05 * np.log2(COMPUTE)
    assert line @ slope_weights(COMPUTE) == pytest.approx(0.05)
    for at in (1, 7, 640):
        assert line @ line_weights(COMPUTE, at) == pytest.approx(0.3 + 0.05 * math.log2(at))


def test_nothing_is_predicted_beyond_a_decade() -> None:
    line_weights(COMPUTE, 640)
    with pytest.raises(ValueError, match="at most 10 times as much"):
        line_weights(COMPUTE, 641)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("differences", "word"),
    [
        (0.05 * FLAT, "persists"),
        (0.05 * FALL, "fades"),
        (0.05 * (1 - FALL), "grows"),
        (0.05 * (2 - FALL), "grows"),
        (0.05 * (2 * FALL - 1), "fades"),  # and turns
        (0 * FLAT, "not settled"),
        (0.05 * FLAT + 0.1 * SEEDS, "not settled"),
    ],
)
def test_a_word_says_how_a_difference_changes(differences: Any, word: str, sign: int) -> None:
    assert word_of(sign * differences) == word


def test_a_slope_is_corrected_for_the_number_of_variants() -> None:
    fading = (COMPUTE, 0.003 * FALL + NOISE)
    alone, *_ = trends([fading])
    among, *others = trends([fading] + [(COMPUTE, NOISE)] * 9)
    assert (alone.word, among.word) == ("fades", "not settled")
    assert {other.word for other in others} == {"not settled"}
    assert alone.slope.adjusted is not None
    assert among.slope.adjusted == pytest.approx(10 * alone.slope.adjusted)


def test_what_is_predicted_holds_the_noise_of_new_runs() -> None:
    """Three of the rungs themselves: at the mean of their logarithms a line has a third of the variance."""
    differences = NOISE[:, 1:]
    line = differences.mean(axis=1)
    found = predict(COMPUTE[1:], differences, COMPUTE[2])
    assert line.std() > 0
    half = 4.3027 * line.std(ddof=1) / 3**0.5 * (1 + 3) ** 0.5
    assert found.high - found.mean == pytest.approx(half, rel=1e-4)


def test_the_largest_rung_is_predicted_from_the_others_alone() -> None:
    one, two = 0.05 * FLAT + NOISE, 0.05 * FLAT + NOISE
    two[:, -1] += 1
    first, second = trends([(COMPUTE, one)])[0], trends([(COMPUTE, two)])[0]
    assert first.last == second.last
    assert first.last is not None
    assert first.last.low < 0.05 < first.last.high
    assert trends([(COMPUTE[1:], one[:, 1:])])[0].last is None
    assert trends([(COMPUTE * [1, 1, 1, 11], one)])[0].last is None


def test_rungs_that_are_no_ladder() -> None:
    assert too_little([1, 2, 4], 2) is None
    assert "2 sizes that both have, and a slope needs 3" in str(too_little([1, 2], 3))
    assert "at every size: 1, and an interval needs 2" in str(too_little([1, 2, 4], 1))
    assert "1.5 times the compute of the smallest" in str(too_little([1, 1.2, 1.5], 3))


@pytest.mark.parametrize("effect", [0.0, 0.05])
def test_slopes_where_there_are_none_are_as_rare_as_is_said(effect: float) -> None:
    draws = 400
    found = simulated(draws, effect, effect)
    assert found.share("grows", "fades") <= 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5


def test_a_planted_fading_is_found_and_the_largest_rung_predicted() -> None:
    found = simulated(400, math.log(1.05), 0.0)
    assert found.share("fades") >= 0.8
    assert abs(found.predicted - 0.95) <= 3 * (0.95 * 0.05 / 400) ** 0.5


def test_what_is_gone_a_decade_further_does_not_persist() -> None:
    assert simulated(400, 0.05, 0.05 * 3.32 / (3.32 + 7.93)).share("persists") <= 0.05


def sweep(folder: Path, effects: dict[str, list[float]], **more: Any) -> Path:
    """The folder of runs at 3 or 4 sizes with 3 seeds; effects by attention, relative to mha.

    In loss above an entropy of 0.5 nats, which halves with each size. NaN: the runs failed. `more` holds
    other numbers of all summaries.
    """
    cells = []
    for attn, by_size in {"mha": [0.0] * 4, **effects}.items():
        for i, effect in enumerate(by_size):
            for seed in range(3):
                run = folder / f"{attn}_{i}_{seed}"
                run.mkdir(parents=True)
                steps, noise = 100 * 2**i, 0 if attn == "mha" else NOISE[seed, i]
                loss = 0.5 + 0.4 * 0.5**i * math.exp(0.01 * seed + effect + noise)
                numbers = {
                    "seed": seed, "steps": steps, "tokens": 10_000 * steps, "train_loss": loss, "val_loss": loss,
                    "val_perplexity": math.exp(min(loss, 99)), "flops_per_token": 1e6 * 2**i,
                    "step_ms": 100, "data_fingerprint": "a", "tokenizer_sha256": "b", "entropy_floor": 0.5,
                    "params_non_embedding": 1e5 * 2**i, **more,
                }  # fmt: skip
                size = [f"model.dim={64 * (i + 1)}", "model.n_heads=2", f"model.n_layers={i + 1}"]
                config = compose(
                    ["pos=rope", f"attn={attn}", *size, f"steps={steps}", f"seed={seed}"]
                )
                (run / "config.json").write_text(json.dumps(config))
                state = "failed" if math.isnan(effect) else "done"
                (run / "status.json").write_text(json.dumps({"state": state, "reason": None}))
                if state == "done":
                    (run / "summary.json").write_text(json.dumps(numbers))
                cells.append({"name": run.name, "parent": None, "config": config})
    (folder / "sweep.json").write_text(json.dumps({"cells": cells, "baseline": "attn=mha"}))
    return folder


def study_of(folder: Path) -> Study:
    return analyse_folders([folder])


def test_a_report_says_whether_a_difference_persists(tmp_path: Path) -> None:
    printed = report(sweep(tmp_path, {"mqa": [0.1] * 4, "gqa": [0.1, 0.06, 0.03, 0.0]}))
    study = study_of(tmp_path)
    persists, fades = ladder_conclusions(study)
    assert (
        "**mqa** from **mha of the same size** in loss above the entropy persists with size: +10.5%"
        in persists
    )
    assert "at 0.1M parameters" in persists
    assert (
        "**gqa** from **mha of the same size** in loss above the entropy fades with size" in fades
    )
    assert "persists with size" in printed
    header, one, _ = ladder_table(study)
    assert header[:5] == ["variant", "0.1M", "0.2M", "0.4M", "0.8M"]
    assert all(cell.startswith("+10.") for cell in one[1:5])
    assert "### By size" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures/ladder.svg").exists()
    found = json.loads((tmp_path / "results.json").read_text())["ladder"]
    assert [each["trend"]["word"] for each in found] == ["persists", "fades"]
    assert found[0]["compute"] == [1e12, 4e12, 1.6e13, 6.4e13]


def test_a_ladder_that_has_begun_compares_no_sizes(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {"mqa": [0.1] * 4})
    for attn in ("mha", "mqa"):
        for i, seed in itertools.product((2, 3), range(3)):
            (folder / f"{attn}_{i}_{seed}/summary.json").unlink()
            (folder / f"{attn}_{i}_{seed}/status.json").unlink()
    study = study_of(folder)
    assert [(c.level, c.base) for c in study.comparisons] == [
        (f"mqa steps={n}", f"mha steps={n}") for n in (100, 200)
    ]
    (sentence,) = ladder_conclusions(study)
    assert "is not judged by size: " in sentence


def test_sizes_that_agree_in_three_digits_have_a_column_each(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {"mqa": [0.1, 0.2, 0.3, 0.4]})
    for summary in folder.glob("m*a_1_*/summary.json"):
        close = json.loads(summary.read_text()) | {"params_non_embedding": 100_040}
        summary.write_text(json.dumps(close))
    header, one = ladder_table(study_of(folder))
    assert header[1:5] == ["0.1M", "0.10004M", "0.4M", "0.8M"]
    assert [cell[:4] for cell in one[1:5]] == ["+10.", "+22.", "+35.", "+49."]


def test_variants_are_compared_at_their_own_size_alone(tmp_path: Path) -> None:
    study = study_of(sweep(tmp_path, {"mqa": [0.1] * 4}))
    assert [(c.level, c.base, c.partners) for c in study.comparisons] == [
        (f"mqa steps={n}", f"mha steps={n}", []) for n in (100, 200, 400, 800)
    ]
    for i, d in enumerate(study.differences.values()):
        assert d.mean == pytest.approx(0.4 * 0.5**i * math.expm1(0.1), rel=0.1)
    assert worths(study) == []
    assert study.warnings == []
    printed = report(tmp_path)
    assert "Not covered: model sizes other than 0.1M to 0.8M" in printed
    assert "other corpora, other learning rates." in printed


def test_steps_that_differ_at_one_size_stay_a_reason_to_doubt(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {"mqa": [0.1] * 4})
    summary = folder / "mqa_1_0/summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"tokens": 1}))
    assert any("unequal budgets" in line for line in study_of(folder).warnings)


def test_without_a_floor_the_loss_itself_is_judged(tmp_path: Path) -> None:
    study = study_of(sweep(tmp_path, {"mqa": [0.1] * 4}, entropy_floor=None))
    (sentence,) = ladder_conclusions(study)
    assert "in perplexity fades with size" in sentence
    report(tmp_path)
    assert "The entropy of the text is not known" in (tmp_path / "report.md").read_text()


def test_a_report_of_fewer_sizes_says_nothing_of_size(tmp_path: Path) -> None:
    for name, effects in {"two": {"mqa": [0.1] * 2}, "alone": {}}.items():
        folder = sweep(tmp_path / name, effects)
        report(folder)
        assert "By size" not in (folder / "report.md").read_text()
        assert "ladder" not in json.loads((folder / "results.json").read_text())
        assert not (folder / "figures/ladder.svg").exists()
        assert study_of(folder).rungs == []
    uncounted = sweep(tmp_path / "uncounted", {"mqa": [0.1] * 4}, flops_per_token=None)
    assert ladders(study_of(uncounted)) == []


def test_a_size_that_failed_is_left_out(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {"mqa": [0.1, 0.1, 0.1, math.nan]})
    (found,) = ladders(study_of(folder))
    assert found.sizes == [1e5, 2e5, 4e5]


def test_a_ladder_of_one_seed_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {"mqa": [0.1] * 4})
    for i in range(2):
        (folder / f"mqa_{i}_{i}/summary.json").unlink()
        (folder / f"mqa_{i}_{i}/status.json").write_text('{"state": "failed", "reason": null}')
    study = study_of(folder)
    (sentence,) = ladder_conclusions(study)
    assert "is not judged by size: seeds that both have at every size: 1" in sentence
    assert ladder_figure(study, {}) is None


def test_a_grid_of_two_factors_at_three_sizes_is_compared_factor_by_factor(tmp_path: Path) -> None:
    """Not cell by cell with the baseline of its size: those would differ in both."""
    folders = [sweep(tmp_path / pos, {"mqa": [0.1] * 4}) for pos in ("rope", "none")]
    for path in folders[1].glob("*/config.json"):
        config, other = json.loads(path.read_text()), compose(["pos=none"])
        choices = config["choices"] | {"pos": "none"}
        path.write_text(json.dumps(config | {"pos": other["pos"], "choices": choices}))
    study = analyse_folders(folders)
    assert study.rungs == []
    assert {(c.factor, c.level) for c in study.comparisons} >= {("attn", "mqa"), ("pos", "none")}


def test_a_difference_beyond_any_measure_is_said_and_not_computed() -> None:
    assert percent(0.01) == "+1.0%"
    assert percent(800.0) == "over +1e+08%"
    assert np.isfinite(percents([800.0, -800.0])).all()
