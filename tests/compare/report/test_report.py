"""The report says what the runs say: no more, no less."""

import csv
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from scipy import stats

from cli import calibrate as honesty
from cli.report import main
from compare.report.analysis import analyse_folders
from compare.report.evaluations.kinds import KNOWN, length_table
from compare.report.figures import FIGURES, pareto, smooth
from compare.report.runs import read
from compare.report.style import canvas, legend_below, styles_of
from compare.report.tables import main_table
from compare.report.variants import variants_of
from compare.report.verdict.conclusions import conclusions
from compare.report.write import report
from compare.statistics.paired import Difference, correct, mean_interval, paired, seeds_needed
from train.config import options
from train.config.keys import MISSING

Write = Callable[..., Path]


def said(folder: Path) -> str:
    return "\n".join(conclusions(analyse_folders([folder])))


def difference(folder: Path) -> Difference:
    """That of the only variant beside the baseline."""
    (found,) = analyse_folders([folder]).differences.values()
    return found


def grid(write: Write, effects: dict[str, float], noise: list[float], **more: Any) -> Path:
    """Runs of several position schemes, each that much worse than the seed's own level."""
    for pos, effect in effects.items():
        for seed, level in enumerate(noise):
            wobble = {"rope": 0.002, "none": -0.003}.get(pos, 0.0) * (seed - 1)
            folder = write(
                f"{pos}{seed}", 3 + level + effect + wobble, f"pos={pos}", f"seed={seed}", **more
            )
    return folder.parent


def test_a_paired_test_is_the_textbooks() -> None:
    one, two = [3.1, 3.4, 2.9, 3.3], [3.0, 3.1, 2.9, 3.0]
    found = paired([a - b for a, b in zip(one, two, strict=True)])
    assert found.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    low, high = stats.ttest_rel(one, two).confidence_interval(0.95)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert mean_interval([1.0, 2.0, 3.0])[1] == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
    assert paired([0.5]).p is None
    assert not correct([paired([0.5])])[0].significant


def test_many_comparisons_are_judged_together() -> None:
    """Holm 1979: the smallest p times m, the next times m - 1, never below the one before."""
    found = [paired([x, 1.1 * x, 0.9 * x + d]) for x, d in ((1, 0), (1, 0.9), (1, 3), (1, 9))]
    ps = [d.p for d in found]
    order = sorted(range(4), key=lambda i: ps[i])
    expected, worst = {}, 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1, ps[i] * (4 - rank)))
        expected[i] = worst
    assert [d.adjusted for d in correct(found)] == [pytest.approx(expected[i]) for i in range(4)]
    assert any(d.p < 0.05 < d.adjusted for d in correct(found))


def test_noise_is_called_noise_and_two_deviations_are_found() -> None:
    draw = random.Random(0)

    def share(mean: float, seeds: int, comparisons: int = 1) -> float:
        drawn = (
            correct(
                [paired([draw.gauss(mean, 1) for _ in range(seeds)]) for _ in range(comparisons)]
            )
            for _ in range(400)
        )
        return sum(any(d.significant for d in found) for found in drawn) / 400

    assert share(0, 6) <= 0.07
    assert share(0, 3, comparisons=4) <= 0.07
    assert share(2, 5) >= 0.8


def test_seeds_to_settle_are_enough_and_not_too_many() -> None:
    assert [seeds_needed(effect, 0.05) for effect in (8.0, 2.0, 1.0, 0.5, 0.0)] == [
        3,
        5,
        10,
        34,
        101,
    ]
    assert seeds_needed(1.0, 0.01) > seeds_needed(1.0, 0.05)


def test_the_report_is_honest_about_equal_runs(write: Write) -> None:
    draw = random.Random(1)
    for seed in range(24):
        level = draw.gauss(3, 0.05)
        write(f"a/whole{seed}", level, f"seed={seed}", "steps=4", steps=4)
        worse = level + 0.2 + draw.gauss(0, 0.02)
        if seed < 12:
            write(f"a/half{seed}", worse, f"seed={seed}", "steps=2", steps=2)
    folder = write("one", 3.0).parent / "a"
    runs = [run for run in read([folder]) if run.summary["steps"] == 4]
    assert honesty.equal(runs, 200) <= 0.07
    assert honesty.faint(runs, 100) >= 0.8
    assert honesty.main([str(folder), "splits=200"]) == 0


def test_a_real_difference_is_said_with_its_size_and_interval(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": -0.1}, [0.0, 0.3, -0.2])
    text = said(folder)
    assert re.search(r"\*\*rope\*\* vs\. \*\*learned\*\*: lowers perplexity by 9\.\d% "
                     r"\(95% interval -1\d\.\d% to -9\.\d%, 3 seeds\)", text)  # fmt: skip
    assert difference(folder).significant


def test_noise_says_how_many_seeds_would_settle_it(write: Write) -> None:
    for attn, losses in (("mha", [3.0, 3.1, 3.2]), ("mqa", [3.1, 3.0, 3.25])):
        for seed, loss in enumerate(losses):
            folder = write(f"{attn}{seed}", loss, f"attn={attn}", f"seed={seed}")
    text = said(folder.parent)
    assert "no significant difference in perplexity" in text
    assert re.search(r"about \d+ needed|more than 100 needed", text)
    assert "83% less KV cache" in text


def test_one_seed_is_no_verdict(write: Write) -> None:
    write("a", 3.0, "pos=learned")
    folder = write("b", 2.0, "pos=rope").parent
    assert "one seed: significance unknown" in said(folder)
    assert any("one seed" in line for line in analyse_folders([folder]).warnings)
    assert not difference(folder).significant


def test_a_factor_is_compared_over_its_partners_within_each_seed(write: Write) -> None:
    for i, (attn, pos) in enumerate(
        [("mha", "rope"), ("mha", "none"), ("mqa", "rope"), ("mqa", "none")]
    ):
        for seed in range(3):
            loss = (
                3
                + seed
                + (0.1 if attn == "mqa" else 0)
                + (0.5 if pos == "none" else 0)
                + 0.01 * i * seed
            )
            folder = write(f"{attn}{pos}{seed}", loss, f"attn={attn}", f"pos={pos}", f"seed={seed}")
    found = analyse_folders([folder.parent], "attn=mha pos=rope")
    (attn, pos) = found.comparisons
    assert (attn.factor, attn.level, set(attn.partners)) == ("attn", "mqa", {"none", "rope"})
    assert attn.quality.mean == pytest.approx(0.1 + 0.02)
    assert pos.quality.mean == pytest.approx(0.5 + 0.01)
    assert attn.quality.n == 3
    assert attn.ratios["kv_cache_bytes_per_token"] == pytest.approx(1 / 6)
    shutil.rmtree(folder.parent / "mqanone2")
    (attn, pos, both) = analyse_folders([folder.parent], "attn=mha pos=rope").comparisons
    assert (both.level, both.base, both.quality.n) == ("mqa none", "mha rope", 2)
    assert (attn.quality.n, attn.partners) == (
        3,
        ["rope"],
    )  # a partner that would cost a seed is left out
    assert (pos.quality.n, pos.partners) == (3, ["mha"])


def test_perplexity_is_not_compared_across_corpora_or_tokenizers(write: Write) -> None:
    write("a", 3.0)
    folder = write("b", 2.0, "pos=rope", data_fingerprint="another").parent
    assert analyse_folders([folder]).metric is None
    assert any("different corpora" in line for line in analyse_folders([folder]).warnings)
    assert "perplexity" not in said(folder)
    (folder / "b/summary.json").write_text(
        (folder / "b/summary.json").read_text().replace("another", "text").replace("codec", "other")
    )
    found = analyse_folders([folder])
    assert found.metric.name == "bits per byte"
    assert difference(folder).mean == pytest.approx(math.log(2.0 / 3.0))


def test_a_terminal_shows_quality_whatever_it_is_measured_in(write: Write) -> None:
    write("a", 3.0)
    folder = write("b", 2.0, "pos=rope", tokenizer_sha256="other").parent
    header, first, *_ = report(folder).splitlines()
    assert "bits per byte" in header
    assert "1.5000" in first
    assert "perplexity" not in header


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"kernel": "flash"}, "Different attention kernels"),
        ({"device": "cuda"}, "device differs (cpu, cuda)"),
        ({"threads": 1}, "threads differs (1, 2)"),
        ({"tokens": 5}, "unequal budgets"),
        ({"curve": [5.0, 4.0, 3.0]}, "bit-identical"),
        ({}, None),
    ],
)
def test_suspicious_comparisons_are_flagged(
    change: dict[str, Any], warning: str | None, write: Write
) -> None:
    for seed in range(3):
        write(f"a{seed}", 3.0 + seed, f"seed={seed}", curve=[5.0, 4.0, 3.0] if seed == 0 else None)
        more = change if seed == 0 or "curve" not in change else {}
        folder = write(f"b{seed}", 2.0 + seed, "pos=rope", f"seed={seed}", **more)
    warnings = analyse_folders([folder.parent]).warnings
    assert any(warning in line for line in warnings) if warning else not warnings


def test_kernels_that_were_asked_for_are_the_factor_and_no_fault(write: Write) -> None:
    for kernel in ("matmul", "flash"):
        folder = write(f"{kernel}", 3.0, f"kernel={kernel}", kernel=kernel).parent
    assert not any("kernel" in line for line in analyse_folders([folder]).warnings)
    write("gqa", 3.0, "kernel=flash", "attn=gqa", kernel="matmul")
    (line,) = (
        line for line in analyse_folders([folder]).warnings if "Different attention kernels" in line
    )
    assert "flash: mha kernel=flash; matmul: gqa kernel=flash" in line


def test_the_same_losses_with_less_memory_are_no_fault(write: Write) -> None:
    for seed in range(3):
        curve = [5.0 + seed, 4.0, 3.0]
        for memory in ("full", "lean"):
            switches = (f"seed={seed}", f"memory={memory}")
            folder = write(f"{memory}{seed}", 3.0 + seed, *switches, curve=curve).parent
    assert not any("bit-identical" in line for line in analyse_folders([folder]).warnings)


@pytest.mark.parametrize("change", ["force=true", "convert=first", "eval_every=7"])
def test_what_changes_no_result_is_no_factor(change: str, write: Write) -> None:
    write("one", 3.0, "seed=0")
    variants, _ = variants_of(read([write("two", 3.1, "seed=1", change).parent]))
    assert [variant.label for variant in variants] == ["mha learned"]


def test_runs_from_before_a_key_existed_are_of_the_same_variant(write: Write) -> None:
    write("new", 3.0, "seed=0")
    old = write("old", 3.1, "seed=1")
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(
        json.dumps({key: value for key, value in config.items() if key not in MISSING})
    )
    variants, _ = variants_of(read([old.parent]))
    assert [len(variant.done) for variant in variants] == [2]


def test_what_follows_from_another_switch_is_no_switch(write: Write) -> None:
    """GQA's KV heads come with attn=gqa; steps that differ with it are confounded."""
    write("a", 3.0, "attn=mha")
    write("b", 3.0, "attn=gqa")
    folder = write("c", 3.0, "attn=gqa", "attn.n_kv_heads=3").parent
    variants, confounded = variants_of(read([folder]))
    assert [v.label for v in variants] == ["mha", "gqa n_kv_heads=2", "gqa n_kv_heads=3"]
    assert confounded == []
    found = analyse_folders(
        [folder]
    )  # no two differ in one key alone: each is set against the baseline
    assert [(c.level, c.base) for c in found.comparisons] == [
        ("gqa n_kv_heads=2", "mha"),
        ("gqa n_kv_heads=3", "mha"),
    ]
    write("other/a", 3.0, "attn=mha", "steps=5")
    folder = write("other/b", 3.0, "attn=mqa", "steps=9").parent
    variants, confounded = variants_of(read([folder]))
    assert ([v.label for v in variants], confounded) == (["mha", "mqa"], ["steps"])


def test_stages_are_one_curve(write: Write) -> None:
    first = write("first", 3.0, curve=[5.0, 4.0, 3.0])
    write("second", 2.0, f"init_from={first}", "model.max_len=256", curve=[2.9, 2.5, 2.0])
    (run,) = read([first.parent])
    assert run.history("train") == [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.9), (5, 2.5), (6, 2.0)]
    assert [stage.folder.name for stage in run.stages] == ["first", "second"]
    assert run.get("train_seconds") == 20.0  # of both
    report(first.parent)
    assert "| 2 | 3 | 256 | 2.0000 |" in (first.parent / "report.md").read_text()


def test_a_stage_that_ends_badly_is_why_the_next_has_no_result(write: Write) -> None:
    first = write("first", 3.0)
    second = write("second", 2.0, f"init_from={first}")
    write("other", 3.1, "pos=rope")
    for folder, state in ((first, "failed"), (second, "waiting")):
        (folder / "summary.json").unlink()
        why = {"failed": "training diverged\nat step | 2", "waiting": "first did not end well"}
        (folder / "status.json").write_text(json.dumps({"state": state, "reason": why[state]}))
    report(first.parent)
    page = (first.parent / "report.md").read_text()
    assert "1 of 2 runs have no result: second (training diverged at step | 2)" in page
    assert "| second | waiting | training diverged at step \\| 2 | - |" in page
    assert "still to come" not in page


def test_learning_rates_are_compared_at_a_shared_one_and_at_each_ones_best(write: Write) -> None:
    losses = {("mha", 1e-3): 3.0, ("mha", 3e-3): 2.5, ("mqa", 1e-3): 2.8, ("mqa", 3e-3): 2.9}
    for (attn, rate), loss in losses.items():
        folder = write(f"{attn}{rate}", loss, f"attn={attn}", f"optim.lr={rate}")
    found = analyse_folders([folder.parent])
    assert found.rate == 3e-3
    assert [v.label for v in found.compared] == ["mha lr=0.003", "mqa lr=0.003"]
    assert found.baseline.factors == {"attn": "mha", "optim.lr": 3e-3}
    report(folder.parent)
    page = (folder.parent / "report.md").read_text()
    assert f"| mqa | {math.exp(2.9):.2f} | 0.001 | {math.exp(2.8):.2f} |" in page


def test_losses_are_set_against_the_entropy_where_it_is_known(write: Write) -> None:
    """In nats, over the seeds of runs that have a floor; without any there is no such column."""
    losses = [1.1, 1.25, 1.3]
    for seed, loss in enumerate(losses):
        folder = write(f"mha{seed}", loss, f"seed={seed}", entropy_floor=1.0)
    write("mqa", 1.5, "attn=mqa", entropy_floor=None)
    write("nan", math.nan, "seed=3", entropy_floor=1.0, val_perplexity=math.nan)
    header, *rows = main_table(analyse_folders([folder.parent]))
    low, high = stats.t.interval(0.95, 2, 0.21666667, stats.sem(losses))
    column = header.index("above the entropy")
    assert [row[column] for row in rows] == [f"0.2167 ({low:.4f} to {high:.4f})", "-"]
    header, *_ = main_table(analyse_folders([folder.parent / "mqa"]))
    assert "above the entropy" not in header


def test_a_key_of_numbers_has_a_curve(write: Write) -> None:
    """Learning rates have a figure of their own; two levels are no curve."""
    for loss, width in ((3.0, 64), (2.8, 128)):
        folder = write(f"w{width}", loss, f"model.ff_dim={width}")
    report(folder.parent)
    assert not (folder.parent / "figures/numbers.svg").exists()
    write("w512", 2.7, "model.ff_dim=512")
    report(folder.parent)
    drawn = (folder.parent / "figures/numbers.svg").read_text()
    assert "model.ff_dim" in drawn
    assert "by model.ff_dim: means over seeds" in (folder.parent / "report.md").read_text()


def test_a_sweep_of_the_learning_rate_alone_compares_rates(write: Write) -> None:
    write("a", 3.0, "optim.lr=1e-3")
    found = analyse_folders([write("b", 2.5, "optim.lr=3e-3").parent])
    assert found.rate is None
    assert [(c.factor, c.level) for c in found.comparisons] == [("optim.lr", "0.003")]


def test_patterns_of_layers_are_levels_too(write: Write) -> None:
    write("a", 3.0)
    for folder in (write("b", 3.0), write("c", 3.1)):
        config = json.loads((folder / "config.json").read_text())
        config["attn"]["pattern"] = ["local", "global"] if folder.name == "b" else ["local"]
        (folder / "config.json").write_text(json.dumps(config))
    assert "pattern=[local,global]" in report(folder.parent)


def test_a_loss_that_is_not_finite_counts_nowhere_and_spoils_nothing(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": -0.1}, [0.0, 0.3, -0.2])
    bad = math.nan
    write("zodd", bad, "pos=none", val_perplexity=bad, val_bits_per_byte=bad, curve=[5.0, bad, bad])
    write("zhuge", 800.0, "pos=none", "seed=1")
    printed = report(folder)
    assert "zodd ended with a loss that is not finite" in printed
    assert "rope vs. learned: lowers perplexity" in printed


def test_an_interval_that_ends_beyond_all_numbers_costs_no_report(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": 0.0}, [0.0, 121.0])
    write("rope2", 600.0, "pos=rope", "seed=2")
    write("learned2", 4.0, "pos=learned", "seed=2")
    report(folder)
    assert "| learned | 3 |" in (folder / "report.md").read_text()


def test_costs_that_were_not_measured_have_no_panel(write: Write) -> None:
    """As peak memory on MPS, where times of runs side by side do not compare."""
    folder = grid(write, {"learned": 0.0, "rope": 0.0}, [0.0, 0.1], peak_train_bytes=None)
    for environment in (path.parent / "environment.json" for path in folder.glob("*/status.json")):
        environment.write_text('{"side_by_side": 2}')
    report(folder)
    drawn = (folder / "figures/quality.svg").read_text()
    assert "KV cache" in drawn
    assert "peak training memory" not in drawn


def test_pictures_of_others_are_left_alone(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": 0.0}, [0.0, 0.1])
    (folder / "figures").mkdir()
    for name in ("claims.svg", "length.svg"):
        (folder / "figures" / name).write_text("another's")
    report(folder)
    assert (folder / "figures/claims.svg").exists()
    assert not (folder / "figures/length.svg").exists()  # of an earlier report


def test_a_seed_that_failed_early_does_not_cut_the_others(write: Write) -> None:
    for seed in range(3):
        folder = write(f"a{seed}", 3.0, f"seed={seed}")
    (folder / "summary.json").unlink()
    (folder / "status.json").write_text('{"state": "failed", "reason": "x", "last_step": 1}')
    (folder / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 99.0}\n')
    (variant,) = analyse_folders([folder.parent]).variants
    assert [run.folder.name for run in variant.done] == ["a0", "a1"]
    report(folder.parent)
    assert (folder.parent / "figures/training.svg").exists()


def test_each_run_counts_once_and_is_not_its_own_parent(write: Write, tmp_path: Path) -> None:
    parent = write("runs/mine", 3.0)
    tuned = write("tuned/mine", 2.0, f"init_from={parent}")
    assert [run.folder for run in read([tuned])] == [tuned]
    assert len(read([parent, tuned])) == 2  # both were named
    assert len(read([parent, parent.parent])) == 1
    write("runs/again", 3.5)
    found = analyse_folders([parent.parent])
    assert any("more than one run with the same seed" in line for line in found.warnings)


@pytest.mark.parametrize("change", [{"threads": 1}, {"dtype": "bfloat16"}, {"device": "cuda"}])
def test_times_are_not_compared_across_settings_of_the_machine(
    change: dict[str, Any], write: Write
) -> None:
    for seed in range(3):
        write(f"a{seed}", 3.0 + seed, f"seed={seed}")
        folder = write(f"b{seed}", 2.0 + seed, "pos=rope", f"seed={seed}", **change)
    found = analyse_folders([folder.parent])
    assert found.times == {}
    assert all(c.time is None for c in found.comparisons)
    assert "step time" not in said(folder.parent)
    assert (
        "| training time (relative) |"
        not in (report(folder.parent), (folder.parent / "report.md").read_text())[1]
    )


def test_no_two_variants_look_alike(write: Write) -> None:
    for attn in ("mha", "gqa", "mqa"):
        for pos in ("learned", "rope", "none", "t5"):
            folder = write(f"{attn}{pos}", 3.0, f"attn={attn}", f"pos={pos}")
    found = analyse_folders([folder.parent])
    styles = styles_of(found)
    assert len({(s.colour, s.line) for s in styles.values()}) == 12
    few = replace(found, variants=found.variants[:8])
    assert len({(s.colour, s.line) for s in styles_of(few).values()}) == 8


def manifest(folder: Path, **report: object) -> None:
    """Make a folder of runs the folder of a sweep whose report has these options."""
    runs = sorted(path.parent for path in folder.glob("*/status.json"))
    cells = [{"name": path.name, "config": {}, "parent": None} for path in runs]
    content = {"baseline": None, "cells": cells, **report}
    (folder / "sweep.json").write_text(json.dumps(content))


def test_a_config_names_the_leading_figure_its_file_its_notes_and_a_table(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": -0.1}, [0.0, 0.3, -0.2])
    (folder / "broken").mkdir()  # a run that left no config
    (folder / "broken/status.json").write_text('{"state": "failed", "reason": "x"}')
    options = {"title": "Loss", "figure": "training", "figure_file": "one", "tables": ["decoding"]}
    manifest(folder, **options, notes=["Beware of the **dog**."])
    report(folder)
    page = (folder / "report.md").read_text()
    assert page.startswith("# Loss\n")
    assert "![one](figures/one.svg)\n\nLoss. Training loss" in page
    assert "- Beware of the **dog**." in page
    assert "<p>Beware of the <b>dog</b>.</p>" in (folder / "report.html").read_text()
    assert "| learned | 128 |" in page
    assert page.count("with a KV cache: after") == 2
    assert {p.name for p in (folder / "figures").iterdir()} >= {"one.svg", "quality.svg"}


def test_a_run_that_left_no_config_is_a_variant_of_its_own(write: Write) -> None:
    folder = write("a", 3.0).parent
    (folder / "broken").mkdir()
    (folder / "broken/status.json").write_text('{"state": "failed", "reason": "x"}')
    found = analyse_folders([folder])
    assert [v.label for v in found.variants] == ["mha learned", "run=broken"]
    assert found.warnings[0] == "1 of 2 runs have no result: broken (x)."
    assert not any("confounded" in line for line in found.warnings)


def test_a_report_without_options_has_no_table_of_decoding(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": -0.1}, [0.0])
    manifest(folder, title=None, figure="quality", figure_file=None, tables=[], notes=[])
    report(folder)
    page = (folder / "report.md").read_text()
    assert page.startswith(f"# {folder.name}\n")
    assert "Multiply-adds to decode" not in page
    assert page.index("quality.svg") < page.index("training.svg")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"figure_file": "../mine"}, r"report.figure_file='../mine' may hold letters"),
        ({"tables": ["x"]}, "report.tables=x: no such choice"),
        ({"figure": "x"}, "report.figure=x: no such choice"),
        ({"notes": "x"}, "report.notes=x is not a list"),
    ],
)
def test_a_sweep_cannot_ask_for_what_no_config_may(
    option: dict[str, Any], message: str, write: Write
) -> None:
    manifest(write("a", 3.0).parent, **option)
    with pytest.raises(ValueError, match=message):
        report(write("b", 3.0).parent)


def test_sweeps_from_before_these_options_keep_their_names_and_tables(write: Write) -> None:
    """The title named the file of the leading figure, and the figure `decoding` brought a table."""
    folder = grid(write, {"learned": 0.0, "rope": -0.1}, [0.0])
    title = "Questions 1 and 2: text, and loss"
    manifest(folder, title=title, figure="training")
    report(folder)
    assert (folder / "figures/question-1.svg").exists()
    assert f"{title}. Training loss" in (folder / "report.md").read_text()
    manifest(folder, title="mine", figure="decoding")
    report(folder)
    assert "Multiply-adds to decode" in (folder / "report.md").read_text()


def test_every_figure_that_a_config_may_name_exists() -> None:
    assert [*FIGURES, *KNOWN] == options.FIGURES


def test_the_page_stands_alone_and_runs_nothing(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": -0.1, "none": 0.2}, [0.0, 0.3, -0.2])
    (folder / "rope0/sample.txt").write_text("<script>alert(1)</script> \x1b[31m ```")
    (folder / "broken").mkdir()
    (folder / "broken/status.json").write_text(
        '{"state": "failed", "reason": "<img src=x onerror=alert(1)>", "last_step": 3}'
    )
    printed = report(folder)
    page = (folder / "report.html").read_text()
    assert len(page) < 2e6
    assert not re.search(r"<script|<img|<link|@import|url\((?!#)|src=[\"']|href=[\"'](?!#)", page)
    assert page.count("<svg") >= 3
    assert "currentColor" in page
    assert "onerror" not in page.replace("&lt;img src=x onerror", "")
    assert "no result: broken (<img" in printed
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {"report.html", "report.md", "results.csv", "results.json"}
    assert {"training.svg", "quality.svg", "differences.svg"} <= {
        p.name for p in (folder / "figures").iterdir()
    }


def test_the_results_are_there_for_programs(write: Write) -> None:
    folder = grid(write, {"learned": 0.0, "rope": -0.1}, [0.0, 0.3, -0.2])
    assert main([str(folder), "baseline=pos=rope"]) == 0
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["done"] * 6
    assert (
        float(rows[0]["val_loss"])
        == json.loads((folder / "learned0/summary.json").read_text())["val_loss"]
    )
    assert (rows[0]["params"], rows[0]["kernel"]) == ("1000", "matmul")
    found = json.loads((folder / "results.json").read_text())
    assert found["baseline"] == "rope"
    (learned,) = (v for v in found["variants"] if v["label"] == "learned")
    assert learned["difference"]["real"] is True
    assert learned["difference"]["mean"] == pytest.approx(0.1, abs=0.01)
    with pytest.raises(
        ValueError, match=r"baseline=pos=alibi: no such variant here; there are learned, rope"
    ):
        main([str(folder), "baseline=pos=alibi"])
    with pytest.raises(ValueError, match="no run there"):
        main([str(folder / "figures")])
    with pytest.raises(ValueError, match="bas: no such key"):
        main([str(folder), "bas=x"])


def test_a_cell_of_the_results_is_what_the_summary_says(write: Write) -> None:
    write("a", 3.0, kernel=["flash", "matmul"], params=None, compiled=True)
    folder = write("b", 2.5, "pos=rope", only_here=7).parent
    report(folder)
    first, second = csv.DictReader((folder / "results.csv").open())
    assert (first["kernel"], first["params"], first["compiled"]) == (
        '["flash", "matmul"]',
        "",
        "True",
    )
    assert (second["params"], second["only_here"], first["only_here"]) == ("1000", "7", "")
    assert (first["reason"], second["val_loss"]) == ("", "2.5")


def test_a_legend_of_long_labels_fits_its_figure() -> None:
    figure, panels = canvas(2, height=3.0)
    for i in range(6):
        panels[0].plot([0, 1], label=f"n_kv_heads={i} max_len=128 schedule=constant")
    legend_below(figure, panels[0])
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert legend.get_window_extent().width <= figure.bbox.width


def test_a_variant_is_on_the_front_if_none_beats_it_in_both() -> None:
    assert pareto([(3, 1), (1, 3), (2, 2), (3, 3), (2.5, 2)]) == [(1, 3), (2, 2), (3, 1)]


def test_a_smoothed_curve_keeps_its_mean_and_does_not_mix_stages() -> None:
    curve = [(step, 1.0 if step <= 505 else 9.0) for step in range(1, 1001)]
    reduced = smooth(pd.Series(dict(curve)).to_frame(), [505])
    assert set(reduced[0]) == {1.0, 9.0}
    assert len(reduced) == 101  # of 10 steps each, but the two beside the end of the stage


def test_contexts_of_unequal_runs_are_in_order(write: Write) -> None:
    for pos, contexts in (("learned", (256, 512)), ("rope", (128, 256))):
        rows = [{"pos": pos, "factor": None, "context": n, "loss": 3.0} for n in contexts]
        folder = write(pos, 3.0, f"pos={pos}")
        (folder / "eval").mkdir()
        (folder / "eval/length.json").write_text(json.dumps({"rows": rows}))
    head, *rows = length_table(analyse_folders([folder.parent]))
    assert head == ["perplexity at context", "128", "256", "512"]
    assert rows == [["learned", "", "20.1", "20.1"], ["rope", "20.1", "20.1", ""]]


@pytest.mark.parametrize(
    ("argument", "why"), [("split=9", "split: no such key"), ("splits=x", "splits=x must be")]
)
def test_a_calibration_takes_a_number_of_splits(argument: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        honesty.main([argument])
