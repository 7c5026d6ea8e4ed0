"""The conclusions of a study in sentences, and the methods behind its numbers."""

import math
import shlex

from compare.cost.counts import decoding_costs
from compare.report.analysis import Comparison, Study
from compare.report.curves.ladder import ladder_conclusions
from compare.report.curves.worth import worth_conclusions
from compare.report.evaluations.exact_match import differences, points
from compare.report.runs import Run
from compare.report.variants import BARE, Variant, plain, settings_of
from compare.statistics.paired import LEVEL, LIMITS, MANY, Difference, percent, with_interval
from compare.statistics.sequential import Decision
from train.config.keys import HELD
from train.sweep.expand import ROUNDS

ONE_BY_ONE = 4  # differences that a sentence tells one by one


def conclusions(study: Study) -> list[str]:
    """One sentence for each question that the runs can answer, and their scope."""
    sentences = answer_conclusions(study) + [conclusion(c, study) for c in study.comparisons]
    sentences += worth_conclusions(study) + ladder_conclusions(study)
    trained = [run for v in study.variants for run in v.done if run.get("steps")]
    if trained and study.metric is None and len(study.variants) > 1:
        sentences.insert(0, "Quality is not compared: see the warnings.")
    if trained and sentences:
        sentences.append(scope(study, trained[0]))
    return sentences


def cache_savings(study: Study) -> list[str]:
    """Multiply-adds that each variant's KV cache saves, and its size: one sentence per variant."""
    return [cache_saving(v) for v in study.variants if v.runs[0].config]


def cache_saving(v: Variant) -> str:
    end = decoding_costs(v.runs[0].config)[-1]
    return (
        f"**{v.label}** with a KV cache: after {end.length:,} tokens, decoding the next one takes "
        f"{end.multiply_adds:,.0f} multiply-adds in attention, {end.saved:.1%} fewer than without "
        f"({end.multiply_adds_uncached:,.0f}); the cache stores {end.cache_elements:,} numbers."
    )


def scope(study: Study, run: Run) -> str:
    """Sizes, budgets and settings that the conclusions do not cover."""
    settings = settings_of(run)
    rate = f"learning rates other than {plain(settings.get('optim.lr'))} (see experiment=lr)"
    most = max(run.tokens for v in study.variants for run in v.done)
    return (
        f"Not covered: model sizes other than {sizes(study, run)}, more than "
        f"{most / 1e6:,.1f}M training tokens, other corpora, "
        f"{rate if study.rate is None and not study.rungs else 'other learning rates'}."
    )


def sizes(study: Study, run: Run) -> str:
    """The size of all models, that of a run, or the smallest and the largest."""
    if not study.rungs:
        size = (run.get("params_non_embedding") or 0) / 1e6
        return f"{settings_of(run).get('model')} ({size:,.1f}M non-embedding parameters)"
    found = [run.get("params_non_embedding") or 0 for v in study.variants for run in v.done]
    return (
        f"{min(found) / 1e6:.3g}M to {max(found) / 1e6:.3g}M non-embedding parameters, but for what is said of "
        "ten times the compute"
    )


def headline(c: Comparison) -> str:
    """What is compared with what."""
    name = "" if c.factor in ("", *BARE) else f"{c.factor}="
    head = f"**{name}{c.level}** vs. **{name}{c.base}**"
    return head + (f" (mean over {', '.join(c.partners)})" if len(c.partners) > 1 else "")


def answer_conclusions(study: Study) -> list[str]:
    """What each choice changes in the share of questions that are answered exactly."""
    found = differences(study)
    asked = {
        headline(c): {
            group: tests[key]
            for group, tests in found.items()
            if (key := (c.factor, c.level)) in tests
        }
        for c in study.comparisons
    }
    return [f"{head}: exact match {answered(tests)}." for head, tests in asked.items() if tests]


def answered(tests: dict[str, Difference]) -> str:
    """Differences in exact match by group of questions: the significant ones, a few each by itself."""
    if all(d.low is None for d in tests.values()):
        each = [f"{points(d.mean)} points at {group}" for group, d in tests.items()]
        return f"{', '.join(each)} (one seed: significance unknown)"
    told = {group: d for group, d in tests.items() if d.significant}
    if not told:
        return f"without a significant difference at {listed([*tests], 'any of')}"
    if len(told) > ONE_BY_ONE:
        means = [d.mean for d in told.values()]
        return (
            f"between {points(min(means))} and {points(max(means))} points, significant at "
            f"{len(told)} of {len(tests)} kinds of questions"
        )
    each = [f"{with_interval(d.mean, d.low, d.high, points)} points at {group}" for group, d in told.items()]  # fmt: skip
    rest = [group for group in tests if group not in told]
    return ", ".join(each) + (
        f"; no significant difference at {listed(rest, 'the other')}" if rest else ""
    )


def listed(groups: list[str], many: str) -> str:
    """Groups of questions by name, or only how many there are."""
    return ", ".join(groups) if len(groups) <= ONE_BY_ONE else f"{many} {len(groups)} kinds"


def conclusion(c: Comparison, study: Study) -> str:
    """Quality, time, cache, memory and size of a level against the baseline's."""
    head, parts = headline(c), []
    if study.metric and c.quality:
        if c.decision and study.margin is not None:
            seeds = max(len(v.runs) for v in study.variants)  # that were asked for
            last = study.over and seeds >= ROUNDS[-1]
            parts.append(decided(c.decision, study.metric.name, study.margin, last=last))
        else:
            parts.append(in_words(c.quality, study.metric.name, "lowers", "raises"))
    if c.time:
        parts.append(in_words(c.time, "step time", "shortens", "lengthens"))
    for key, (less, what) in COSTS.items():
        ratio = c.ratios.get(key)
        if ratio is not None and abs(ratio - 1) >= 0.005:
            parts.append(f"{abs(ratio - 1):.0%} {less if ratio < 1 else 'more'} {what}")
    return f"{head}: {'; '.join(parts) or 'nothing measured'}."


COSTS = {
    "kv_cache_bytes_per_token": ("less", "KV cache"),
    "peak_train_bytes": ("less", "training memory"),
    "params": ("fewer", "parameters"),
}


def decided(decision: Decision, what: str, margin: float, *, last: bool = False) -> str:
    """What the rounds of seeds have come to, with the difference and its interval at that look.

    After the `last` round a question can be open if some of its seeds have no result.
    """
    d = decision.difference
    assert d.low is not None
    assert d.high is not None
    words = {
        "better": f"lowers {what}",
        "worse": f"raises {what}",
        "equal": f"the same {what} to within {margin:.1%}",
        "hopeless": f"no answer on {what} to be expected within {ROUNDS[-1]} seeds",
        "open": f"no answer on {what} {'with the seeds that have a result' if last else 'yet'}",
        "not settled": f"no answer on {what} after the last round",
    }
    return (
        f"{words[decision.word]}: {percent(d.mean)} ({LEVEL:.0%} interval {percent(d.low)} to "
        f"{percent(d.high)}, {d.n} seeds)"
    )


def in_words(d: Difference, what: str, less: str, more: str) -> str:
    """A difference of logarithms in percent, with its interval and its significance."""
    change = percent(d.mean)
    if d.low is None or d.high is None:
        return f"{what} {change} (one seed: significance unknown)"
    details = f"{LEVEL:.0%} interval {percent(d.low)} to {percent(d.high)}, {d.n} seeds"
    if d.significant:
        return f"{less if d.mean < 0 else more} {what} by {abs(math.expm1(d.mean)):.1%} ({details})"
    if d.seeds_needed is not None:
        count = f"more than {MANY}" if d.seeds_needed > MANY else f"about {d.seeds_needed}"
        details += f"; {count} needed"
    if d.significance == "no":
        return f"no significant difference in {what}: {change} ({details})"
    return f"{what} inconclusive after Holm's correction: {change} ({details})"


def in_advance(margin: float | None) -> str:
    """How the number of seeds was, or is to be, chosen."""
    if margin is None:
        return (
            "Choose the number of seeds in advance: adding seeds until a difference is significant finds one "
            "in the end. seeds=auto adds them with limits that allow for it."
        )
    looks = ", ".join(f"{limit:g} at {seeds}" for seeds, limit in LIMITS.items())
    return (
        f"Seeds came in rounds, until each question was answered: p has to be below {looks} seeds, less for several "
        "questions, so that over all looks equal variants are called different in at most 5 %. Equal means two "
        f"one-sided tests at these limits, that the difference is less than {margin:.1%}. The intervals are those of "
        "the look that ended a question, and not corrected for the others."
    )


def methods(study: Study) -> list[str]:
    """Settings, data, machine and statistics, from the records of the runs."""
    done = [run for v in study.variants for run in v.done]
    if not done:
        return []
    first, settings = done[0], [settings_of(run) for run in done]
    held = sorted(
        key
        for key in settings[0].keys() & set(HELD)
        if len({plain(s.get(key)) for s in settings}) == 1
    )
    equal = ", ".join(f"{key}={plain(settings[0][key])}" for key in held)
    alike = {"model.max_len", "batch_size", "data.tokenizer", "data"} <= set(held)
    batches = "see the same batches" if alike else "see different batches where settings differ"
    seeds = sorted({run.seed for run in done})
    tokens = sorted({run.tokens for run in done})
    machines = [
        f"{environment.get('gpu') or environment.get('cpu')}, {run.get('device')}, {run.get('dtype')}, "
        f"{run.get('threads')} threads, kernel {plain(run.get('kernel'))}, torch {environment.get('torch')}, "
        f"commit {str(environment.get('git_commit'))[:12]}"
        for run in done
        if (environment := run.environment)
    ]
    matched = [
        f"{v.label}: feed-forward width {config['model']['ff_dim']}, to match "
        f"{config['matched']['budget']}, to within {config['matched']['leftover']:+.2%}."
        for v in study.variants
        if (config := v.runs[0].stages[0].config).get("matched")
    ]
    return [
        f"Equal for all runs: {equal}. Seeds {', '.join(map(str, seeds))}: with the same seed, two variants start "
        f"with equal values in the parameters of equal shape that they share, and {batches}.",
        f"{' or '.join(f'{n:,}' for n in tokens)} training tokens per run; text "
        f"{str(first.get('data_fingerprint'))[:12]}, tokenizer {str(first.get('tokenizer_sha256'))[:12]} (SHA-256). "
        f"Validation scores {first.get('val_tokens') or 0:,} tokens, each once.",
        f"Hardware and software: {'; '.join(dict.fromkeys(machines)) or 'not recorded'}.",
        "Training time is that of optimizer steps after warm-up, step time their median. Attention time is measured "
        f"in separate passes. Peak memory: {first.get('peak_method') or 'not measured'}.",
        f"Differences are paired by seed, with Student's t intervals at {LEVEL:.0%}. A difference is significant if "
        "its paired t-test holds at 5 % after Holm's correction: over the "
        f"comparisons of the verdict ({len(study.comparisons)}) and, separately, over the rows of the table "
        f"({len(study.differences)}), for quality and for time. It is inconclusive if its interval excludes zero but the corrected "
        f"test does not hold. {in_advance(study.margin)}",
        *matched,
        f"To train the first run again from its record, and compare every loss: "
        f"python -m cli.reproduce {shlex.quote(f'run={first.folder}')}",
    ]
