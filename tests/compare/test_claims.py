"""A published claim asked again gets the word that its runs give it."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cli.claims import main
from compare.report.analysis import analyse_folders
from compare.report.curves.worth import worths
from compare.report.verdict.claim import outcome, word
from compare.report.verdict.claims_page import asked
from compare.report.write import report
from compare.statistics.paired import paired
from train.config.compose import compose
from train.config.options import EXPECTED, RULERS, Claim, Reporting, claim_of
from train.config.schema import arguments
from train.sweep.expand import cells_of

Write = Callable[..., Path]
NOISE = [0.0, 0.002, -0.002]
GIVEN: dict[str, Any] = {
    "says": "It is better.", "published": "1B parameters", "number": "-1 %", "source": "Somebody 2020", "link": "https://arxiv.org",
    "variant": "pos=rope", "ruler": "perplexity", "context": None, "scaled": None, "levels": None,
    "expected": "lower", "margin": 0.01, "written": "2026-11-28",
}  # fmt: skip


def claim(**changes: Any) -> Claim:
    return Claim(**arguments("report.claim", GIVEN | changes, Claim)[0])


def two_schemes(write: Write, effect: float, **more: Any) -> Path:
    """Three seeds of learned positions, and of RoPE with losses that are that much higher."""
    for seed, noise in enumerate(NOISE):
        write(f"a{seed}", 3 + 5 * noise, "pos=learned", f"seed={seed}", **more)
        folder = write(f"b{seed}", 3 + 6 * noise + effect, "pos=rope", f"seed={seed}", **more)
    return folder.parent


@pytest.mark.parametrize(
    ("interval", "words"),
    [
        ((-0.05, -0.02), "reproduced, not here, not here, reproduced"),
        ((-0.05, 0.005), "open, open, open, reproduced"),
        ((-0.005, 0.005), "open, open, reproduced, reproduced"),
        ((-0.005, 0.02), "open, open, open, open"),
        ((0.002, 0.006), "not here, reproduced, reproduced, reproduced"),
        ((0.02, 0.05), "not here, reproduced, not here, not here"),
    ],
)
def test_the_word_is_where_the_interval_lies(interval: tuple[float, float], words: str) -> None:
    low, high = interval
    half = (high - low) / 2 / 12.706204736432095  # Student's t for two values
    d = paired([(low + high) / 2 - half, (low + high) / 2 + half])
    assert (d.low, d.high) == (pytest.approx(low), pytest.approx(high))
    expected = ("lower", "higher", "same", "not higher")
    assert words == ", ".join(word(d, claim(expected=e)) for e in expected)


def test_a_margin_is_a_share_or_a_number_of_points() -> None:
    """10 %, as a logarithm 0.0953, or 10 points."""
    d = paired([0.0965, 0.0966, 0.0967])
    asked_for = {"expected": "same", "margin": 0.1}
    assert word(d, claim(**asked_for)) == "not here"
    assert word(d, claim(**asked_for, ruler="exact match")) == "reproduced"


def test_one_seed_leaves_a_claim_open() -> None:
    assert {word(paired([-0.5]), claim(expected=e)) for e in EXPECTED} == {"open"}


def test_perplexity_is_paired_by_seed(write: Write) -> None:
    study = analyse_folders([two_schemes(write, -0.05)], "pos=learned")
    found = outcome(study, claim())
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(-0.05)
    assert found.difference.sd == pytest.approx(0.002)
    assert found.difference.n == 3
    assert found.word == "reproduced"
    assert found.text.startswith("-4.9% (")
    assert found.text.endswith("), 3 seeds")


def answered(folder: Path, kind: str, content: dict[str, Any]) -> None:
    (folder / "eval").mkdir()
    (folder / "eval" / f"{kind}.json").write_text(json.dumps(content))


def test_a_context_is_read_as_trained_or_scaled(write: Write) -> None:
    folder = two_schemes(write, 0.0)
    for path in folder.iterdir():
        rope = path.name.startswith("b")
        own = "rope" if rope else "learned"
        rows = [("rope_yarn", 2.0, 256, 4.0), ("rope_linear", 2.0, 256, 5.5)] * rope
        rows += [(own, None, 128, 1.0), (own, None, 256, 9.0 + rope)]
        keys = ("pos", "factor", "context", "loss")
        answered(path, "length", {"rows": [dict(zip(keys, row, strict=True)) for row in rows]})
    study = analyse_folders([folder], "pos=learned")
    at = {"ruler": "perplexity at a context"}
    found = outcome(study, claim(**at, context=256))
    assert found.difference is not None
    assert found.difference.mean == 1.0
    scaled = claim(**at, context=256, scaled=["rope_yarn", "rope_linear"])
    found = outcome(analyse_folders([folder], "pos=rope"), scaled)
    assert found.difference is not None
    assert found.difference.mean == -1.5
    assert outcome(study, claim(**at, context=512)).refused == (
        "no seed has both, the variant and the baseline"
    )


def test_exact_match_is_the_mean_over_the_levels_asked_for(write: Write) -> None:
    folder = two_schemes(write, 0.0)
    for path in folder.iterdir():
        better = 0.1 * path.name.startswith("b")
        shares = {"4 letters": 0.5, "8 letters": 0.2 + better, "16 letters": 0.1 + 3 * better}
        answered(path, "answers", {"groups": {k: {"accuracy": x} for k, x in shares.items()}})
    study = analyse_folders([folder], "pos=learned")
    ask = claim(ruler="exact match", expected="higher", levels=[8, 16])
    found = outcome(study, ask)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.2)
    assert found.text == "+20.0 (+20.0 to +20.0) points, 3 seeds"
    whole = outcome(study, claim(ruler="exact match", expected="higher")).difference
    assert whole is not None
    assert whole.mean == pytest.approx(0.4 / 3)


def test_sensitivity_is_the_mean_loss_above_the_best_and_bounded_by_that_before_training(
    write: Write,
) -> None:
    """Of 7 before training, losses of 3, 3.3 and 9 become 0, 0.3 and 4 above the best; RoPE's 3.5, 3.8 and 4.1
    are 0, 0.3 and 0.6.
    """
    losses = {"learned": (3.0, 3.3, 9.0), "rope": (3.5, 3.8, 4.1)}
    unfinished = {(3, 2)}  # a seed without its last rate
    every = itertools.product(losses, range(4), range(3))
    for pos, seed, number in (cell for cell in every if cell[1:] not in unfinished):
        rate = ("1e-3", "1e-2", "1e-1")[number]
        loss = losses[pos][number] + [*NOISE, 0.1][seed] * number
        keys = (f"pos={pos}", f"optim.lr={rate}", f"seed={seed}")
        folder = write(f"{pos}{rate}{seed}", loss, *keys, curve=[7.0, 5.0])
        if loss > 8 and seed == 2:
            (folder / "summary.json").unlink()
            failed = {"state": "failed", "reason": "training diverged at step 2"}
            (folder / "status.json").write_text(json.dumps(failed))
    study = analyse_folders([folder.parent], "pos=learned")
    found = outcome(study, claim(ruler="rate sensitivity"))
    assert found.difference is not None
    assert found.difference.n == 3
    assert found.difference.mean == pytest.approx(0.3 - 4.3 / 3, abs=1e-9)
    assert found.difference.sd == pytest.approx(2 / 3 * 0.002)
    assert found.word == "reproduced"


def test_a_worth_that_is_refused_leaves_a_claim_open(write: Write) -> None:
    study = analyse_folders([two_schemes(write, -0.05)], "pos=learned")
    found = outcome(study, claim(ruler="compute"))
    assert (found.word, found.difference) == ("open", None)
    assert found.text == "rope has no worth in compute: that needs several numbers of steps"


def test_a_worth_below_one_is_lower(write: Write) -> None:
    """Losses of 3.2, 2.9 and 2.65, and those 0.1 above them: more compute than was spent."""
    for seed, noise in enumerate(NOISE):
        for steps, loss in ((200, 3.2), (400, 2.9), (800, 2.65)):
            for pos in ("learned", "rope"):
                folder = write(
                    f"{pos}{steps}{seed}", loss + noise + 0.1 * (pos == "rope"), f"pos={pos}", f"steps={steps}",
                    f"seed={seed}", steps=steps, tokens=100 * steps, flops_per_token=1e6,
                )  # fmt: skip
    study = analyse_folders([folder.parent], "pos=learned")
    found = outcome(study, claim(ruler="compute"))
    assert found.word == "reproduced"
    assert found.difference is not None
    assert found.difference == worths(study)[-1].compute
    assert -0.5 < found.difference.mean < 0
    assert found.text.startswith(f"{math.exp(found.difference.mean):.2f}x (")


def test_a_variant_that_is_not_there_leaves_a_claim_open(write: Write) -> None:
    study = analyse_folders([two_schemes(write, -0.05)], "pos=learned")
    found = outcome(study, claim(variant="pos=alibi"))
    assert found.word == "open"
    assert "no such variant here" in found.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ruler": "size"}, "report.claim.ruler=size: no such choice"),
        ({"expected": "better"}, "report.claim.expected=better: no such choice"),
        ({"context": 256}, "report.claim.context=256 is of ruler='perplexity at a context'"),
        ({"ruler": "perplexity at a context"}, "report.claim.context=None is of ruler="),
        ({"margin": -0.1}, "report.claim.margin=-0.1 must be at least 0 and below 1"),
        ({"paper": "x"}, "report.claim.paper: no such key"),
        ({"says": None}, "report.claim.says=None is not a text"),
    ],
)
def test_a_claim_that_cannot_be_asked_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        claim(**changes)


def test_a_claim_is_a_group_of_keys() -> None:
    keys = compose([])["report"]
    with pytest.raises(ValueError, match="report.claim=x is not a group of keys or null"):
        arguments("report", keys | {"claim": "x"}, Reporting)


def test_every_claim_has_a_sign_a_source_and_both_of_its_sides() -> None:
    experiments = asked(Path("nowhere"))
    assert len(experiments) == 10
    assert {a.claim.ruler for a in experiments} <= set(RULERS)
    for a in experiments:
        assert a.claim.link.startswith("https://"), a.name
        assert a.config["name"] == f"claim-{a.name}"
        cells = cells_of([f"experiment={a.experiment}"], multirun=False)
        seeds = [next(o for o in cell if o.startswith("seed=")) for cell in cells]
        assert len(set(seeds)) >= 4, a.name
        assert len({seeds.count(seed) for seed in seeds}) == 1, a.name


def test_a_report_leads_with_its_claim_and_the_page_gathers_it(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = two_schemes(write, -0.05)
    sweep = folder / "sweeps/claim-gated"
    sweep.mkdir(parents=True)
    for path in [p for p in folder.iterdir() if p.name != "sweeps"]:
        path.rename(sweep / path.name)
    cells = [{"name": p.name, "parent": None} for p in sorted(sweep.iterdir())]
    ask = {"cells": cells, "baseline": "pos=learned", "claim": GIVEN}
    (sweep / "sweep.json").write_text(json.dumps(ask))
    assert "reproduced: It is better. (Somebody 2020: -1 %)" in report(sweep)
    to, picture = tmp_path / "docs/claims.md", tmp_path / "docs/figures/claims.svg"
    assert main([f"to={to}", f"figure={picture}", f"sweeps={folder / 'sweeps'}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not run") == 9
    page = to.read_text()
    assert "**reproduced**. 6 runs, 1 min of training steps" in page
    assert "](figures/claims.svg)" in page
    assert page.count("Not run yet.") == 9
    assert "gated: perplexity" in picture.read_text()
    claims = claim_of(Reporting(**arguments("report", compose([])["report"], Reporting)[0]))
    assert claims is None


def test_the_page_takes_no_other_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="form: no such key; known: to, figure, sweeps"):
        main(["form=html"])
