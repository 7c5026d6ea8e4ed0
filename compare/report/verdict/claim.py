"""A published claim asked again: what the runs of a sweep say to it, in one word."""

import math
from dataclasses import dataclass
from typing import Any

from compare.report.analysis import Study, choose_baseline
from compare.report.runs import Run
from compare.report.verdict.rulers import RULERS
from compare.statistics.paired import LEVEL, Difference, with_interval
from train.config.options import Claim

REPRODUCED, NOT_HERE, OPEN = "reproduced", "not here", "open"


@dataclass(frozen=True)
class Outcome:
    """The difference between a claim's variant and the baseline, or why there is none, and the word."""

    claim: Claim
    variant: str  # labels
    base: str
    word: str
    difference: Difference | None = None
    refused: str | None = None

    @property
    def text(self) -> str:
        """'-3.2% (-4.1% to -2.3%), 6 seeds'; why there is none."""
        d, ruler = self.difference, RULERS[self.claim.ruler]
        if d is None:
            return self.refused or ""
        seeds = f"{d.n} seed{'s' * (d.n > 1)}"
        return f"{with_interval(d.mean, d.low, d.high, ruler.show)}{ruler.unit}, {seeds}"


def outcome(study: Study, claim: Claim) -> Outcome:
    """What a study says to a claim."""
    base = study.baseline.label
    try:
        v = choose_baseline(study.variants, claim.variant, required=True)
        d = RULERS[claim.ruler].measure(study, claim, v)
    except ValueError as error:
        return Outcome(claim, claim.variant, base, OPEN, refused=str(error))
    return Outcome(claim, v.label, base, word(d, claim), difference=d)


def word(d: Difference, claim: Claim) -> str:
    """reproduced: the interval lies where the claim expects it; not here: all of it elsewhere; else open.

    What does not matter, up to `margin`, is a share of perplexity or of compute, and a number of
    points or nats otherwise.
    """
    if d.low is None or d.high is None:
        return OPEN
    low, high = expected_range(claim)
    if low <= d.low and d.high <= high:
        return REPRODUCED
    return NOT_HERE if d.high < low or d.low > high else OPEN


def expected_range(claim: Claim) -> tuple[float, float]:
    """The differences that a claim expects, from the lowest to the highest."""
    absolute = claim.ruler in ("exact match", "rate sensitivity")
    margin = claim.margin if absolute else math.log1p(claim.margin)
    return {
        "lower": (-math.inf, 0.0),
        "higher": (0.0, math.inf),
        "same": (-margin, margin),
        "not higher": (-math.inf, margin),
    }[claim.expected]


def sentence(found: Outcome) -> str:
    """The outcome as the first sentence of a report."""
    claim = found.claim
    against = "" if found.variant == found.base else f", {found.variant} against {found.base}"
    return (
        f"**{found.word}**: {claim.says} ({claim.source}: {claim.number}) Here {ruler_of(claim)}{against}: "
        f"{found.text} ({LEVEL:.0%} interval); {expectation(claim)} was expected, as written on {claim.written}."
    )


def ruler_of(claim: Claim) -> str:
    """The ruler in words: 'perplexity at 512 tokens, rope_yarn against rope_linear'."""
    if claim.ruler == "perplexity at a context":
        scaled = f", {' against '.join(claim.scaled)}" if claim.scaled else ""
        return f"perplexity at {claim.context:,} tokens{scaled}"
    if claim.ruler == "exact match" and claim.levels:
        return f"exact match at {', '.join(map(str, claim.levels))}"
    return {"compute": "worth in compute"}.get(claim.ruler, claim.ruler)


def expectation(claim: Claim) -> str:
    """'lower', 'not higher than by 1 %'."""
    if claim.expected == "same":
        return f"the same within {claim.margin:.1%}"
    if claim.expected == "not higher":
        return f"no more than {claim.margin:.1%} higher"
    return claim.expected


def facts(found: Outcome, study: Study) -> dict[str, Any]:
    """An outcome for results.json: with the intervals as text, and what ran where."""
    done = [run for v in study.variants for run in v.done]
    d, claim = found.difference, found.claim
    return {
        "word": found.word,
        "text": found.text,
        "ruler": ruler_of(claim),
        "expectation": expectation(claim),
        "expected_range": [None if math.isinf(end) else end for end in expected_range(claim)],
        "difference": d and {"mean": d.mean, "low": d.low, "high": d.high, "seeds": d.n},
        "variant": found.variant,
        "base": found.base,
        "runs": len(done),
        "minutes": math.fsum(run.get("train_seconds") or 0 for run in done) / 60,
        "machines": sorted({machine(run) for run in done}),
    }


def machine(run: Run) -> str:
    """'AMD EPYC, AVX512, bfloat16, 1 thread'."""
    e, threads = run.environment, run.get("threads")
    parts = (
        e.get("gpu") or e.get("cpu"),
        not e.get("gpu") and e.get("cpu_capability"),
        run.get("dtype"),
    )
    return ", ".join(
        [*(str(part) for part in parts if part), f"{threads} thread{'s' * (threads != 1)}"]
    )
