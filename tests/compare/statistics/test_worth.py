"""A variant is worth what the baseline would have needed, or nothing is said."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compare.check.calibration import worth as coverage
from compare.report.analysis import Study, analyse_folders
from compare.report.curves.worth import Worth, worth_conclusions, worth_figure, worth_table, worths
from compare.report.write import report
from compare.statistics.worth import Curve, fit, log_more, no_curve, not_covered
from train.config.compose import compose

STEPS = np.array([200.0, 400.0, 800.0])
CURVE = Curve(floor=1.4, scale=7.25, exponent=0.263)  # 3.2, 2.9 and 2.65 at these steps

#: Published runs of the Hackable Transformer, at 130M, 300M, 520M and 1.2B parameters: FLOPs and bits per
#: byte, fields model_flops and eval_paloma_c4_en_bpb of data/runs.json in github.com/marin-community/speedrun,
#: at commit 04e37e7; run names hackable_transformer_attn_sink/std_attn, hackable_transformer_attn_gate/lr_x1
#: and hackable_transformer_attn_sink/attnsink/jax.
STANDARD = (
    [2.107429813789655e18, 9.97813708514132e18, 4.8779636003945054e19, 2.4710625753168033e20],
    [1.1646385192871094, 1.063051462173462, 0.9861995577812195, 0.9318751692771912],
)
GATED = (
    [2.1289341996446515e18, 1.021384111077458e19, 5.081733891346976e19, 2.5869176757309093e20],
    [1.1564404964447021, 1.0539624691009521, 0.9801320433616638, 0.9263789653778076],
)
SINK = (
    STANDARD[0],
    [1.1648110151290894, 1.0617272853851318, 0.9858213663101196, 0.9332785606384277],
)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [(GATED, [1.10, 1.15, 1.12, 1.16]), (SINK, [1.00, 1.02, 1.01, 0.95])],
)
def test_published_runs_are_worth_what_was_computed_of_them(
    variant: tuple[list[float], list[float]], expected: list[float]
) -> None:
    (compute, losses), (spent, reached) = map(np.array, STANDARD), map(np.array, variant)
    found = compute / spent * np.exp(fit(compute, losses).more(losses, reached))
    assert found.tolist() == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("unit", [1.0, 1e18])
@pytest.mark.parametrize(("floor", "exponent"), [(1.4, 0.26), (0.0, 0.05), (2.4, 1.0)])
def test_a_curve_is_found_from_its_points(floor: float, exponent: float, unit: float) -> None:
    true = Curve(floor, 5.0 * unit**exponent, exponent)
    compute = unit * np.array([100.0, 200.0, 400.0, 1600.0])
    for found in (fit(compute, true.loss(compute)), fit(compute, true.loss(compute), floor)):
        assert found.floor == pytest.approx(floor, abs=1e-5)
        assert found.exponent == pytest.approx(exponent, rel=1e-4)
        assert found.loss(2 * compute) == pytest.approx(true.loss(2 * compute))


def test_the_floor_of_a_curve_is_never_below_zero() -> None:
    """Losses that fall by more at each doubling: a line in ln C would go below zero."""
    assert fit(STEPS, np.array([3.2, 2.9, 2.5])).floor == 0
    assert fit(STEPS, np.array([3.2, 2.9, 2.65])).floor > 1


def test_two_budgets_make_no_curve() -> None:
    with pytest.raises(ValueError, match="2 budgets; a curve needs 3"):
        fit(STEPS[:2], np.array([3.2, 2.9]))


def test_more_steps_are_worth_as_many_times_the_compute() -> None:
    base, variant = CURVE.loss(STEPS), CURVE.loss(1.25 * STEPS)
    assert np.exp(CURVE.more(base, variant)) == pytest.approx([1.25] * 3)
    seeds = np.array([[0.0], [0.3]])  # each seed has a level of its own
    found = log_more(STEPS, base + seeds, variant + seeds)
    assert np.exp(found) == pytest.approx(np.full((2, 3), 1.25))


def test_what_a_pair_of_runs_has_in_common_is_no_worth() -> None:
    off = CURVE.loss(STEPS) + np.array([0.02, -0.03, 0.01])  # not on the curve
    assert CURVE.more(off, off).tolist() == [0, 0, 0]
    assert np.isnan(CURVE.more(off, np.array([1.4, 1.0, 1.5]))).tolist() == [True, True, False]


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_holds_a_known_worth_as_often_as_it_says(seeds: int) -> None:
    draws = 600
    assert abs(coverage(draws, seeds) - 0.95) <= 3 * (0.95 * 0.05 / draws) ** 0.5


def test_the_baselines_curve_has_to_fall_clearly() -> None:
    noise = np.array([[0.01, 0.0, -0.01], [0.0, 0.02, 0.0], [-0.01, 0.0, 0.01]])
    falling = CURVE.loss(STEPS) + noise
    assert no_curve(STEPS, falling) is None
    assert "2 budgets, and a curve needs 3" in str(no_curve(STEPS[:2], falling[:, :2]))
    assert "one seed" in str(no_curve(STEPS, falling[:1]))
    assert flat(no_curve(STEPS, 3.0 + noise))
    unsure = [CURVE.loss(STEPS), [3.0, 2.99, 2.98], [3.0, 2.999, 2.998]]
    assert flat(no_curve(STEPS, np.array(unsure)))
    rising_once = np.concatenate([falling] * 5 + [falling[:1, ::-1]])
    assert flat(no_curve(STEPS, rising_once))


def flat(reason: str | None) -> bool:
    return reason is not None and reason.startswith("the baseline's loss does not clearly fall")


@pytest.mark.parametrize(
    ("at", "times", "reason"),
    [
        (800, 1.9, None),
        (800, 2.1, "2.1 times its largest budget"),
        (400, 3.9, None),
        (400, 4.2, "2.1 times its largest budget"),
        (200, 0.55, None),
        (200, 0.4, "0.4 of its smallest budget"),
        (400, math.nan, "does not come down to its loss"),
        (400, math.exp(700), "over 1,000 times its largest budget"),
        (400, math.exp(-700), "less than 0.001 of its smallest budget"),
    ],
)
def test_a_curve_is_used_within_a_doubling_of_its_budgets(
    at: float, times: float, reason: str | None
) -> None:
    found = not_covered(STEPS, at, [math.log(times)] * 3)
    assert not_covered(STEPS, at, [1e4])  # beyond what exp can hold
    assert found is None if reason is None else reason in str(found)


def sweep(folder: Path, losses: dict[tuple[str, int], list[float]], **more: Any) -> Path:
    """The folder of runs with these losses by attention and steps, one a seed; gqa costs 10 % less.

    A loss that is not a number belongs to a run that failed. `more` holds other numbers of all summaries.
    """
    cells = []
    for (attn, steps), by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            run = folder / f"{attn}_{steps}_{seed}"
            run.mkdir(parents=True)
            cheap = 0.9 if attn == "gqa" else 1.0
            numbers = {
                "seed": seed, "steps": steps, "tokens": 10_000 * steps, "train_loss": loss, "val_loss": loss,
                "val_perplexity": math.exp(min(loss, 99)), "flops_per_token": 1e6 * cheap, "step_ms": 100 * cheap**2,
                "data_fingerprint": "a", "tokenizer_sha256": "b", **more,
            }  # fmt: skip
            config = compose([f"attn={attn}", "pos=rope", f"seed={seed}", f"steps={steps}"])
            (run / "config.json").write_text(json.dumps(config))
            cells.append({"name": run.name, "parent": None, "config": config})
            state = "failed" if math.isnan(loss) else "done"
            (run / "status.json").write_text(json.dumps({"state": state, "reason": None}))
            if state == "done":
                (run / "summary.json").write_text(json.dumps(numbers))
    (folder / "sweep.json").write_text(json.dumps({"cells": cells, "baseline": "attn=mha"}))
    return folder


def planted(
    times: float, steps: tuple[int, ...] = (200, 400, 800)
) -> dict[tuple[str, int], list[float]]:
    """Losses of mha, and of gqa as if it had so many times the steps, for three seeds."""
    levels = (0.0, 0.02, -0.01)
    return {
        (attn, n): [
            float(CURVE.loss(np.array(n * (times if attn == "gqa" else 1)))) + x for x in levels
        ]
        for attn in ("mha", "gqa")
        for n in steps
    }


def study_of(folder: Path) -> Study:
    return analyse_folders([folder])


def last(folder: Path) -> Worth:
    return worths(study_of(folder))[-1]


def test_a_report_says_what_a_variant_is_worth(tmp_path: Path) -> None:
    """1.1 times the steps' loss at 0.9 times the FLOPs and 0.81 times the time of a step."""
    printed = report(sweep(tmp_path, planted(1.1)))
    study = study_of(tmp_path)
    assert worth_conclusions(study) == [
        "**gqa** is worth 1.22x (1.22 to 1.22) of the compute of **mha**, 1.36x (1.36 to 1.36) of its time "
        "(95% intervals, steps 200, 400, 800, 3 seeds)."
    ]
    assert "gqa is worth 1.22x (1.22 to 1.22) of the compute of mha" in printed
    assert "more than 8.0M training tokens" in printed
    rows = worth_table(study)[1:]
    assert [row[1] for row in rows] == ["200", "400", "800", "200, 400, 800"]
    assert {row[2] for row in rows} == {"1.22x (1.22 to 1.22)"}
    assert "### Worth in compute and in time" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures/worth.svg").exists()
    found = json.loads((tmp_path / "results.json").read_text())["worth"][-1]
    assert found["compute"]["mean"] == pytest.approx(math.log(1.1 / 0.9), abs=1e-3)
    assert found["time"]["mean"] == pytest.approx(math.log(1.1 / 0.81), abs=1e-3)


def test_the_noise_of_the_curve_is_in_the_interval(tmp_path: Path) -> None:
    """Seeds whose baseline falls by more or by less, and is always 0.1 above the variant."""
    losses = planted(1.0)
    for n, tilt in ((200, 0.1), (800, -0.1)):
        losses["mha", n] = [x + tilt * i for i, x in zip((-1, 0, 1), losses["mha", n], strict=True)]
    losses |= {("gqa", n): [x - 0.1 for x in losses["mha", n]] for n in (200, 400, 800)}
    d = last(sweep(tmp_path, losses)).compute
    assert d is not None
    assert d.low is not None
    assert d.mean - d.low > 0.05


def test_times_that_do_not_compare_give_no_worth_in_time(tmp_path: Path) -> None:
    folder = sweep(tmp_path, planted(1.1))
    for run in folder.glob("*_*"):
        (run / "environment.json").write_text('{"side_by_side": 2}')
    assert {row[3] for row in worth_table(study_of(folder))[1:]} == {"not comparable"}
    assert "of its time" not in worth_conclusions(study_of(folder))[0]


def test_a_report_without_budgets_says_nothing_of_worth(tmp_path: Path) -> None:
    for name, losses in {
        "one number of steps": planted(1.1, (200,)),
        "one variant": {key: x for key, x in planted(1.1).items() if key[0] == "mha"},
        "a number of steps each": {("mha", 200): [3.2, 3.1], ("gqa", 400): [2.9, 2.8]},
    }.items():
        folder = sweep(tmp_path / name, losses)
        report(folder)
        assert "worth" not in (folder / "report.md").read_text().lower()
        assert "worth" not in json.loads((folder / "results.json").read_text())
        assert not (folder / "figures/worth.svg").exists()


def test_runs_whose_compute_was_not_counted_are_not_judged(tmp_path: Path) -> None:
    assert worths(study_of(sweep(tmp_path, planted(1.1), flops_per_token=None))) == []


@pytest.mark.parametrize(
    ("losses", "reason"),
    [
        (planted(1.1, (200, 400)), "the baseline has 2 budgets, and a curve needs 3: add steps"),
        (
            {key: [3.0, 3.1, 3.05][i:] + [3.0, 3.1, 3.05][:i] for i, key in enumerate(planted(1.1))},
            "the baseline's loss does not clearly fall with compute",
        ),
        (
            planted(1.1) | {("gqa", n): [2.9, math.nan, math.nan] for n in (200, 400, 800)},
            "seeds shared with the baseline's curve: 1, and an interval needs 2",
        ),
        ({key: x[:1] for key, x in planted(1.1).items()}, "the baseline has one seed"),
    ],
)  # fmt: skip
def test_a_worth_is_refused_with_its_reason(
    losses: dict[tuple[str, int], list[float]], reason: str, tmp_path: Path
) -> None:
    study = study_of(sweep(tmp_path, losses))
    (sentence,) = worth_conclusions(study)
    assert f"The worth of **gqa** in the compute of **mha** is not judged: {reason}" in sentence
    assert worth_figure(study, {}) is None


def test_what_is_refused_at_one_budget_is_judged_at_the_others(tmp_path: Path) -> None:
    study = study_of(sweep(tmp_path, planted(3.0)))
    rows = worth_table(study)[1:]
    assert [row[1] for row in rows] == ["200", "400", "800", "200, 400"]
    assert rows[2][2:] == ["-", "-", "-", "its loss would take the baseline 3 times its largest budget"]  # fmt: skip
    assert "steps 200, 400, 3 seeds" in worth_conclusions(study)[0]
    study = study_of(sweep(tmp_path / "more", planted(5.0)))
    assert [row[2] == "-" for row in worth_table(study)[1:]] == [False, True, True]
    assert "steps 200, 3 seeds" in worth_conclusions(study)[0]


def test_a_seed_without_all_budgets_is_left_out(tmp_path: Path) -> None:
    losses = planted(1.1)
    losses["mha", 800][1] = math.nan
    found = last(sweep(tmp_path, losses)).compute
    assert found is not None
    assert found.n == 2
    assert math.exp(found.mean) == pytest.approx(1.1 / 0.9, abs=1e-3)
