"""Seeds in rounds end, and are right as often as they say."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from compare.report.analysis import analyse_folders, undecided
from compare.report.write import report
from compare.statistics.paired import LIMITS, correct, paired
from compare.statistics.sequential import decide, equality
from train.config.compose import compose

DRAWS = 400


def rounds(effect: float, margin: float) -> tuple[Counter[str], float]:
    """How often each word ends the rounds, of normal differences of deviation 1; the mean of seeds."""
    draw = np.random.default_rng(0)
    found = [decide(list(draw.normal(effect, 1.0, 12)), margin) for _ in range(DRAWS)]
    return Counter(d.word for d in found), float(np.mean([d.difference.n for d in found]))


def test_equal_variants_are_seldom_called_different() -> None:
    words, seeds = rounds(0.0, 2.0)
    assert words["better"] + words["worse"] <= 0.07 * DRAWS  # 5 % and the noise of so many draws
    assert words["equal"] >= 0.9 * DRAWS
    assert seeds < 7


def test_two_deviations_are_found_with_few_seeds() -> None:
    words, seeds = rounds(2.0, 0.5)
    assert words["worse"] >= 0.95 * DRAWS
    assert seeds <= 6.5


def test_equal_is_seldom_said_at_the_edge_of_the_margin() -> None:
    words, _ = rounds(1.5, 1.5)
    assert words["equal"] <= 0.07 * DRAWS


def test_without_hope_the_rounds_end() -> None:
    words, seeds = rounds(0.0, 0.01)
    assert words["hopeless"] >= 0.6 * DRAWS
    assert words["equal"] == 0
    assert seeds < 9


def test_a_look_depends_on_the_seeds_so_far_alone() -> None:
    values = [0.1, 0.12, 0.09, -5.0, -9.0]
    early = decide(values[:3], 0.01)
    assert early.word == "worse"
    assert decide(values, 0.01) == early
    assert decide([0.1, 0.2, -0.3, 0.2], 0.01).word == "open"
    with pytest.raises(ValueError, match="2 paired seeds; the first look is at 3"):
        decide([0.1, 0.2], 0.01)


def test_many_questions_need_more_of_each() -> None:
    values = [0.1, 0.11, 0.09]
    assert decide(values, 0.01).word == "worse"
    assert decide(values, 0.01, questions=40).word == "open"


def test_runs_that_repeat_are_equal_at_once() -> None:
    assert equality(paired([0.0, 0.0, 0.0]), 0.01) == 0.0
    assert equality(paired([0.02, 0.02, 0.02]), 0.01) == 1.0
    assert decide([0.0, 0.0, 0.0], 0.01).word == "equal"


def test_a_report_with_looks_asks_more_of_its_tests() -> None:
    d = paired([0.10, 0.16, 0.11])
    assert d.p is not None
    assert LIMITS[3] < d.p < 0.05
    assert correct([d])[0].significant
    assert not correct([d], looks=True)[0].significant


def sweep(folder: Path, effects: dict[str, list[float]]) -> Path:
    """The folder of a sweep in rounds, of which each attention and scheme has these losses."""
    cells = []
    for variant, losses in effects.items():
        attn, pos = variant.split()
        for seed, loss in enumerate(losses):
            config = compose([f"attn={attn}", f"pos={pos}", f"seed={seed}"])
            name = f"{attn}_{pos}_seed-{seed}"
            run = folder / name
            run.mkdir(parents=True)
            numbers = {"seed": seed, "steps": 3, "tokens": 9, "val_loss": loss, "train_loss": loss,
                       "val_perplexity": math.exp(loss), "data_fingerprint": "a", "tokenizer_sha256": "b"}  # fmt: skip
            (run / "config.json").write_text(json.dumps(config))
            (run / "summary.json").write_text(json.dumps(numbers))
            (run / "status.json").write_text('{"state": "done", "reason": null, "last_step": 3}')
            cells.append({"name": name, "overrides": [], "parent": None, "config": config})
    told = {"cells": cells, "known": [], "margin": 0.01, "baseline": "attn=mha pos=learned"}
    (folder / "sweep.json").write_text(json.dumps(told))
    return folder


def test_an_answer_stays_while_some_of_its_partners_go_on(tmp_path: Path) -> None:
    """Crossed factors: positions are settled with all attentions, of which one pair needs more seeds."""
    noise = [0.03, 0.0, 0.04, -0.005, 0.03]
    losses = {
        f"{attn} {pos}": [
            3 + 0.1 * seed - 0.5 * (pos == "rope") * (attn == "gqa") + noise[seed] * (attn == "mqa")
            for seed in range(5 if attn in going else 3)
        ]
        for going in [("mha", "mqa")]
        for attn in ("mha", "gqa", "mqa")
        for pos in ("learned", "rope")
    }
    folder = sweep(tmp_path, losses)
    words = {c.level: c.decision for c in analyse_folders([folder]).comparisons}
    assert words["rope"] is not None
    assert (words["rope"].word, words["rope"].difference.n) == ("better", 3)
    assert words["gqa"] is not None
    assert (words["gqa"].word, words["gqa"].difference.n) == ("better", 3)
    assert words["mqa"] is not None
    assert (words["mqa"].word, words["mqa"].difference.n) == ("open", 5)
    assert {name.split("_")[0] for name in undecided(folder)} == {"mha", "mqa"}


def test_without_a_common_text_there_is_nothing_to_wait_for(tmp_path: Path) -> None:
    folder = sweep(tmp_path, {"mha learned": [3.0, 3.1, 2.9], "mha rope": [3.0, 2.9, 3.1]})
    assert undecided(folder)
    other = folder / "mha_rope_seed-0/summary.json"
    other.write_text(
        other.read_text().replace('"data_fingerprint": "a"', '"data_fingerprint": "b"')
    )
    assert undecided(folder) == []


def test_what_is_decided_gets_no_more_seeds(tmp_path: Path) -> None:
    base = [3.0, 3.1, 2.9]
    folder = sweep(tmp_path, {
        "mha learned": base,
        "mha rope": [x - 0.2 + e for x, e in zip(base, (0.001, 0.0, -0.001), strict=True)],
        "mha none": [x + e for x, e in zip(base, (0.03, -0.02, 0.01), strict=True)],
        "mha alibi": [x + e for x, e in zip(base, (1e-4, -1e-4, 0.0), strict=True)],
    })  # fmt: skip
    words = {c.level: c.decision and c.decision.word for c in analyse_folders([folder]).comparisons}
    assert words == {"rope": "better", "none": "open", "alibi": "equal"}
    assert {name.split("_")[1] for name in undecided(folder)} == {"learned", "none"}
    report(folder)
    said = (folder / "report.md").read_text()
    assert "**rope** vs. **learned**: lowers perplexity: -18" in said
    assert "**alibi** vs. **learned**: the same perplexity to within 1.0%" in said
    assert "**none** vs. **learned**: no answer on perplexity yet" in said
    assert "Seeds came in rounds" in said
    assert "Choose the number of seeds in advance" not in said


def test_a_run_that_failed_in_the_first_round_does_not_end_the_others(tmp_path: Path) -> None:
    """Of two seeds that are left nothing is said, but more are asked for."""
    folder = sweep(tmp_path, {"mha learned": [3.0, 3.1, 2.9], "mha rope": [2.8, 2.9, 2.7]})
    (folder / "mha_learned_seed-1/summary.json").unlink()
    (folder / "mha_learned_seed-1/status.json").write_text('{"state": "failed", "reason": "x"}')
    (one,) = analyse_folders([folder]).comparisons
    assert one.decision is None
    assert {name.split("_")[1] for name in undecided(folder)} == {"learned", "rope"}
