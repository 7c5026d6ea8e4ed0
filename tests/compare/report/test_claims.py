"""A published claim asked again gets the word that its runs give it."""

import itertools
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cli.claims import main
from cli.train import train
from compare.report.analysis import analyse, analyse_folders
from compare.report.curves.worth import worths
from compare.report.runs import read
from compare.report.variants import Variant, is_baseline
from compare.report.verdict.claim import expectation, facts, outcome, word
from compare.report.verdict.claims_page import asked
from compare.report.write import report
from compare.report.write import write as write_report
from compare.statistics.paired import paired
from train.config.compose import compose, parse
from train.config.options import EXPECTED, RULERS, Claim, Reporting, claim_of
from train.config.schema import arguments
from train.sweep.expand import cells_of

Write = Callable[..., Path]
NOISE = [0.0, 0.002, -0.002]
GIVEN: dict[str, Any] = {
    "says": "It is better.", "published": "1B parameters", "number": "-1 %", "source": "Somebody 2020", "link": "https://arxiv.org",
    "variant": "pos=rope", "ruler": "perplexity", "context": None, "scaled": None, "levels": None,
    "expected": "lower", "margin": 0.0, "written": "2026-11-28",
}  # fmt: skip


AT_256 = {"ruler": "perplexity at a context", "context": 256}


def claim(**changes: Any) -> Claim:
    bounded = changes.get("expected") in ("same", "not higher")
    given = GIVEN | ({"margin": 0.01} if bounded else {}) | changes
    return Claim(**arguments("report.claim", given, Claim)[0])


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


def test_no_difference_is_neither_lower_nor_higher() -> None:
    same = paired([0.0, 0.0, 0.0])
    found = {e: word(same, claim(expected=e)) for e in EXPECTED}
    assert found == {
        "lower": "open", "higher": "open", "same": "reproduced", "not higher": "reproduced",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"expected": "not higher"}, "no more than 1.0% higher"),
        ({"expected": "same", "margin": 0.02}, "the same to within 2.0%"),
        ({"ruler": "exact match", "expected": "same", "margin": 0.1}, "the same to within 10.0 points"),
        ({"ruler": "rate sensitivity", "expected": "not higher", "margin": 0.1}, "no more than 0.10 nats higher"),
        ({"ruler": "compute"}, "below 1"),
        ({"expected": "higher"}, "higher"),
    ],
)  # fmt: skip
def test_what_is_expected_has_its_unit(changes: dict[str, Any], words: str) -> None:
    assert expectation(claim(**changes)) == words


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
        "no seed of both, the variant and the baseline, has the answers of eval=length"
    )


def test_other_measures_than_perplexity_are_refused(write: Write) -> None:
    for pos in ("learned", "rope"):
        for seed in range(2):
            folder = write(f"{pos}{seed}", 3.0, f"pos={pos}", f"seed={seed}", tokenizer_sha256=pos)
    found = outcome(analyse_folders([folder.parent], "pos=learned"), claim())
    assert found.word == "open"
    assert found.refused == "the runs compare by bits per byte, and not by perplexity"


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
    lacking = folder / "b0/eval/answers.json"
    lacking.write_text(json.dumps({"groups": {"8 letters": {"accuracy": 1.0}}}))
    fewer = outcome(study, ask).difference
    assert fewer is not None
    assert (fewer.n, fewer.mean) == (2, pytest.approx(0.2))
    lacking.unlink()
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
    told = facts(found, study)
    assert told["planned"] - told["done"] == 0  # that one diverged is an answer


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
    assert (found.variant, found.base) == ("rope", "learned")
    assert -0.5 < found.difference.mean < 0
    assert found.text.startswith(f"{math.exp(found.difference.mean):.3f}x (")


def test_a_variant_that_is_not_there_leaves_a_claim_open(write: Write) -> None:
    study = analyse_folders([two_schemes(write, -0.05)], "pos=learned")
    found = outcome(study, claim(variant="pos=alibi"))
    assert found.word == "open"
    assert found.text == "variant=pos=alibi: none of that name has finished runs"


def test_a_baseline_without_a_result_leaves_a_claim_open(write: Write) -> None:
    """Another variant then stands in for it in the report: here the claim's own."""
    folder = two_schemes(write, -0.05)
    for path in folder.glob("a*"):
        (path / "summary.json").unlink()
        (path / "status.json").write_text('{"state": "failed", "reason": "killed"}')
    found = outcome(analyse(read([folder]), "pos=learned"), claim())
    assert found.word == "open"
    assert found.text == "rope is the baseline, too: has another one finished runs?"


def test_a_variant_differs_in_what_the_claim_names_alone(write: Write) -> None:
    """Of two variants with that attention, the one with the baseline's positions is meant."""
    worse = {
        ("mha", "rope"): 0.0,
        ("mha", "learned"): 0.2,
        ("gqa", "learned"): 0.5,
        ("gqa", "rope"): 0.1,
    }
    for (attn, pos), effect in worse.items():
        for seed, noise in enumerate(NOISE):
            keys = (f"attn={attn}", f"pos={pos}", f"seed={seed}")
            folder = write(f"{attn}{pos}{seed}", 3 + noise + effect, *keys)
    ask = claim(variant="attn=gqa")
    found = outcome(analyse_folders([folder.parent], "attn=mha pos=rope"), ask)
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(0.1)
    for path in folder.parent.glob("gqarope*"):
        shutil.rmtree(path)
    found = outcome(analyse_folders([folder.parent], "attn=mha pos=rope"), ask)
    assert found.text == "gqa learned differs from the baseline in pos, too: name it in variant"


def test_a_variant_has_the_rate_and_the_steps_of_the_baseline(write: Write) -> None:
    """Twice the rate, and half the steps, are 0.5 worse; at the same ones RoPE is better."""
    for pos, rate, steps, seed in itertools.product(
        ("rope", "learned"), ("2e-3", "1e-3"), (200, 400), range(3)
    ):
        worse = 0.5 * (rate == "2e-3") + 0.5 * (steps == 200) - 0.1 * (pos == "rope")
        keys = (f"pos={pos}", f"optim.lr={rate}", f"steps={steps}", f"seed={seed}")
        folder = write(f"{pos}{rate}{steps}{seed}", 3 + worse + NOISE[seed], *keys)
    base = "pos=learned optim.lr=1e-3 steps=400"
    found = outcome(analyse_folders([folder.parent], base), claim())
    assert found.difference is not None
    assert found.difference.mean == pytest.approx(-0.1)
    longer = outcome(analyse_folders([folder.parent], base), claim(variant="pos=rope steps=200"))
    assert longer.difference is not None
    assert longer.difference.mean == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ruler": "size"}, "report.claim.ruler=size: no such choice"),
        ({"expected": "better"}, "report.claim.expected=better: no such choice"),
        ({"context": 256}, "report.claim.context=256 is of ruler='perplexity at a context'"),
        ({"ruler": "perplexity at a context"}, "report.claim.context=None is of ruler="),
        ({"margin": -0.1}, "report.claim.margin=-0.1 must be at least 0 and below 1"),
        ({"margin": 0.1}, "report.claim.margin=0.1: above 0 for expected=same"),
        ({"expected": "same", "margin": 0.0}, "report.claim.margin=0: above 0 for expected=same"),
        ({"variant": " "}, "report.claim.variant is empty"),
        (
            {"scaled": ["rope_yarn", "rope_linear"]},
            "report.claim.scaled=.* for ruler='perplexity at",
        ),
        (AT_256 | {"scaled": ["rope_yarn"]}, "two ways to scale positions"),
        (AT_256 | {"scaled": ["rope_yarn", "yarn"]}, "report.claim.scaled=yarn: no such choice"),
        ({"levels": [4]}, "report.claim.levels=.* is of ruler='exact match'"),
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
        runs = [SimpleNamespace(config=compose(cell)) for cell in cells]
        for run in runs:
            run.stages = [run]
        sides = [
            {o.key_or_group: o.value() for o in parse(text.split())}
            for text in (a.claim.variant, str(a.config["baseline"] or a.claim.variant))
        ]
        named = [
            [run for run in runs if is_baseline(cast(Variant, SimpleNamespace(runs=[run])), side)]
            for side in sides
        ]
        assert all(named), a.name
        assert (named[0] == named[1]) == (a.claim.scaled is not None), a.name


def test_seeds_that_stop_are_not_those_of_a_claim() -> None:
    with pytest.raises(ValueError, match="seeds=auto looks before it adds seeds"):
        train(["experiment=claims/gqa", "seeds=auto"])


def test_a_report_leads_with_its_claim_and_the_page_gathers_it(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for attn, seed in itertools.product(("mha", "gqa"), range(3)):
        loss = 3 + NOISE[seed] - 0.05 * (attn == "gqa")
        sweep = write(f"claim-gqa/{attn}{seed}", loss, f"attn={attn}", f"seed={seed}").parent
    folder = sweep.parent
    cells = [{"name": p.name, "parent": None} for p in sorted(sweep.iterdir())]
    config = compose(["experiment=claims/gqa"])["report"]["claim"]
    command = ["anywhere/train.py", "experiment=claims/gqa", "threads=1"]
    ask = {"command": command, "cells": cells, "baseline": "attn=mha", "claim": config}
    (sweep / "sweep.json").write_text(json.dumps(ask))
    assert f"reproduced: {config['says']} ({config['source']}: none printed) Here" in report(sweep)
    to, picture = tmp_path / "docs/claims.md", tmp_path / "docs/figures/claims.svg"
    assert main([f"to={to}", f"figure={picture}", f"sweeps={folder}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not run") == 9
    page = to.read_text()
    assert "**Reproduced**. 6 runs, 1 min of training steps" in page
    assert "](figures/claims.svg)" in page
    assert f"python -m cli.claims to={to} figure={picture} sweeps=" in page
    assert page.count("Not run yet.") == 9
    assert "python train.py experiment=claims/gqa threads=1\n" in page
    assert "python train.py experiment=claims/alibi\n" in page
    assert "gqa: perplexity" in picture.read_text()
    write_report([sweep], "attn=gqa")  # a claim names its own baseline
    assert "claim" not in json.loads((sweep / "results.json").read_text())


def gated(**changes: Any) -> dict[str, Any]:
    """A result of experiment=claims/gated, as in results.json."""
    report_keys = compose(["experiment=claims/gated"])["report"]
    asked_for = claim_of(Reporting(**arguments("report", report_keys, Reporting)[0]))
    assert asked_for is not None
    found = {
        "asked": asdict(asked_for), "word": "open", "text": "-1.0%, 1 seed", "difference": None, "variant": "gated",
        "base": "mha", "done": 12, "planned": 12, "minutes": 3.0, "machines": [],
    }  # fmt: skip
    return found | changes


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (gated(), "open"),
        (gated(done=7), "unfinished"),
        (gated(asked=gated()["asked"] | {"expected": "higher"}), "not run"),
        (gated(asked=gated()["asked"] | {"says": "Otherwise."}), "open"),
    ],
)
def test_a_result_counts_if_it_is_whole_and_was_asked_so(
    found: dict[str, Any], word: str, tmp_path: Path
) -> None:
    (tmp_path / "claim-gated").mkdir()
    (tmp_path / "claim-gated/results.json").write_text(json.dumps({"claim": found}))
    assert {a.name: a.word for a in asked(tmp_path)}["gated"] == word
    to, picture = tmp_path / "claims.md", tmp_path / "claims.svg"
    assert main([f"to={to}", f"figure={picture}", f"sweeps={tmp_path}"]) == 0
    assert not picture.exists()
    assert "![" not in to.read_text()


@pytest.mark.parametrize("found", [3, None, {"word": "open"}, gated(word="true")])
def test_a_damaged_result_is_one_line(found: object, tmp_path: Path) -> None:
    (tmp_path / "claim-gated").mkdir()
    (tmp_path / "claim-gated/results.json").write_text(json.dumps({"claim": found}))
    with pytest.raises(
        ValueError, match=r"results.json has no result of a claim; python report.py"
    ):
        asked(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("form=html", "form: no such key; known: to, figure, sweeps"),
        ("to", "to=. figure=outputs/figures/claims.svg: a page is a .md"),
        ("sweeps=nowhere", "sweeps=nowhere is no folder; python train.py experiment=claims/alibi"),
    ],
)
def test_the_page_refuses_other_input(given: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main([given])
