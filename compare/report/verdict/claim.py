"""A published claim asked again: what the runs of a sweep say to it, in one word."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from compare.report.analysis import Study, wanted_by
from compare.report.runs import Run
from compare.report.variants import Variant, is_baseline
from compare.report.verdict.rulers import RULERS, bounded_loss
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
    over = RULERS[claim.ruler].over
    base = study.baseline.without(*over).label
    try:
        v = variant_of(claim, study)
        d = RULERS[claim.ruler].measure(study, claim, v)
    except ValueError as error:
        return Outcome(claim, claim.variant, base, OPEN, refused=str(error))
    return Outcome(claim, v.without(*over).label, base, word(d, claim), difference=d)


def variant_of(claim: Claim, study: Study) -> Variant:
    """The variant that a claim names; of several, the one that differs least from the baseline.

    Raises ValueError if there is none, if it differs in groups of keys that the claim does not name, or
    if it is the baseline, unless that is read in two ways.
    """
    wanted, base = wanted_by(claim.variant), study.baseline
    found = [v for v in study.variants if v.done and is_baseline(v, wanted)]
    if not found:
        raise ValueError(f"variant={claim.variant}: none of that name has finished runs")
    if claim.scaled is None and base in found:
        raise ValueError(f"{base.label} is the baseline, too: has another one finished runs?")

    def unlike(v: Variant) -> list[str]:
        return [key for key in v.factors if v.level(key) != base.level(key)]

    nearest = min(found, key=lambda v: len(unlike(v)))
    named = {key.partition(".")[0] for key in wanted}  # attn of attn.n_kv_heads=1
    named |= {*RULERS[claim.ruler].over}  # which a ruler takes together
    if others := [k for k in unlike(nearest) if not {k, k.partition(".")[0]} & named]:
        raise ValueError(
            f"{nearest.label} differs from the baseline in {', '.join(others)}, too: name it in variant"
        )
    return nearest


def word(d: Difference, claim: Claim) -> str:
    """reproduced: the interval lies where the claim expects it; not here: all of it elsewhere; else open."""
    if d.low is None or d.high is None:
        return OPEN
    low, high = expected_range(claim)
    if low < d.low and d.high < high:
        return REPRODUCED
    return NOT_HERE if d.high < low or d.low > high else OPEN


def expected_range(claim: Claim) -> tuple[float, float]:
    """The differences that a claim expects, between these two ends."""
    margin = claim.margin if RULERS[claim.ruler].unit else math.log1p(claim.margin)
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
    interval = f" ({LEVEL:.0%} interval)" if found.difference and found.difference.n > 1 else ""
    return (
        f"**{found.word}**: {claim.says} ({claim.source}: {claim.number}) Here {ruler_of(claim)}{against}: "
        f"{found.text}{interval}; {expectation(claim)} was expected, as written on {claim.written}."
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
    """'lower', 'no more than 1.0% higher'."""
    ruler = RULERS[claim.ruler]
    margin = (
        f"{ruler.show(claim.margin).lstrip('+')}{ruler.unit}"
        if ruler.unit
        else f"{claim.margin:.1%}"
    )
    if claim.ruler == "compute" and claim.expected in BESIDE_ONE:
        return BESIDE_ONE[claim.expected]
    if claim.expected == "same":
        return f"the same to within {margin}"
    return f"no more than {margin} higher" if claim.expected == "not higher" else claim.expected


BESIDE_ONE = {"lower": "below 1", "higher": "above 1"}


def facts(found: Outcome, study: Study) -> dict[str, Any]:
    """An outcome for results.json, with what was asked and what ran where."""
    runs = [run for v in study.variants for run in v.runs]
    done = [run for run in runs if run.done]
    told = [run for run in runs if run.done or counts(found.claim, run)]
    return {
        "asked": asdict(found.claim),
        "word": found.word,
        "text": found.text,
        "difference": found.difference and asdict(found.difference),
        "variant": found.variant,
        "base": found.base,
        "done": len(told),
        "planned": len(runs),
        "minutes": math.fsum(run.get("train_seconds") or 0 for run in done) / 60,
        "machines": sorted({machine(run) for run in done}),
    }


def counts(claim: Claim, run: Run) -> bool:
    """True for a run that has no result and still tells of a claim: that it diverged is an answer."""
    return claim.ruler == "rate sensitivity" and run.over and bounded_loss(run) is not None


def machine(run: Run) -> str:
    """'AMD EPYC, AVX512, bfloat16, 1 thread, 2 runs at a time'."""
    e, threads = run.environment, run.get("threads")
    processor = (e.get("gpu"),) if e.get("gpu") else (e.get("cpu"), e.get("cpu_capability"))
    parts = [str(part) for part in (*processor, run.get("dtype")) if part]
    parts.append(f"{threads} thread{'s' * (threads != 1)}")
    together = e.get("side_by_side") or 1
    return ", ".join([*parts, *([f"{together} runs at a time"] if together > 1 else [])])
