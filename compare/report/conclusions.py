"""The conclusions of a study in sentences, and the methods behind its numbers."""

import math

from compare.cost.counts import decoding_costs
from compare.report.analysis import Comparison, Study
from compare.report.runs import Run
from compare.report.statistics import LEVEL, MANY, Difference
from compare.report.tables import percent
from compare.report.variants import BARE, Variant, plain, settings_of
from train.config.keys import HELD


def conclusions(study: Study) -> list[str]:
    """One sentence for each question that the runs can answer, and their scope."""
    sentences = [conclusion(c, study) for c in study.comparisons]
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
        f"**{v.label}** generates with a KV cache: after {end.length:,} tokens one more takes "
        f"{end.multiply_adds:,.0f} multiply-adds in attention, {end.saved:.1%} fewer than the "
        f"{end.multiply_adds_uncached:,.0f} without it, for {end.cache_elements:,} numbers kept."
    )


def scope(study: Study, run: Run) -> str:
    """Sizes, budgets and settings that the conclusions do not cover."""
    settings = settings_of(run)
    rate = (
        f"what other learning rates than {plain(settings.get('optim.lr'))} would give (experiment=lr asks)"
        if study.rate is None
        else "learning rates that were not tried"
    )
    return (
        f"What this cannot tell: other sizes than model={settings.get('model')} "
        f"({(run.get('params_non_embedding') or 0) / 1e6:,.1f}M parameters beside embeddings), longer "
        f"training than {run.tokens / 1e6:,.1f}M tokens, other text, or {rate}."
    )


def conclusion(c: Comparison, study: Study) -> str:
    """Quality, time, cache, memory and size of a level against the baseline's."""
    name = "" if c.factor in ("", *BARE) else f"{c.factor}="
    head = f"**{name}{c.level}** against **{name}{c.base}**"
    if len(c.partners) > 1:
        head += f" (over {', '.join(c.partners)})"
    parts = []
    if study.metric and c.quality:
        parts.append(in_words(c.quality, study.metric.name, "lowers", "raises"))
    if c.time:
        parts.append(in_words(c.time, "time of a step", "shortens", "lengthens"))
    for key, what in COSTS.items():
        ratio = c.ratios.get(key)
        if ratio is not None and abs(ratio - 1) >= 0.005:
            parts.append(f"{'saves' if ratio < 1 else 'adds'} {abs(ratio - 1):.0%} of {what}")
    return f"{head}: {'; '.join(parts) or 'nothing measured'}."


COSTS = {
    "kv_cache_bytes_per_token": "the KV cache",
    "peak_train_bytes": "training memory",
    "params": "parameters",
}


def in_words(d: Difference, what: str, less: str, more: str) -> str:
    """A difference of logarithms in percent, with its interval and its significance."""
    change = percent(d.mean)
    if d.low is None or d.high is None:
        return f"{change} {what} with one seed, which tells no difference from noise"
    seeds = f"{LEVEL:.0%} interval {percent(d.low)} to {percent(d.high)}, {d.n} seeds"
    if d.significant:
        return f"{less if d.mean < 0 else more} {what} by {abs(math.expm1(d.mean)):.1%} ({seeds})"
    beside = (
        "inside the noise" if d.low <= 0 <= d.high else "not settled once all comparisons count"
    )
    return f"{what} {beside}: {change} ({seeds}){needed(d)}"


def needed(d: Difference) -> str:
    if d.seeds_needed is None:
        return ""
    count = f"more than {MANY}" if d.seeds_needed > MANY else f"about {d.seeds_needed}"
    return f", {count} seeds would settle it"


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
    batches = "both see the same batches" if alike else "batches differ where the settings do"
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
        f"{v.label}: feed-forward {config['model']['ff_dim']} wide to match "
        f"{config['matched']['budget']}; {config['matched']['leftover']:+.2%} left over."
        for v in study.variants
        if (config := v.runs[0].stages[0].config).get("matched")
    ]
    return [
        f"Held equal: {equal}. Seeds {', '.join(map(str, seeds))}: parameters of equal shape that two "
        f"variants share start equal, and {batches}.",
        f"{' or '.join(f'{n:,}' for n in tokens)} training tokens a run; text "
        f"{str(first.get('data_fingerprint'))[:12]}, tokenizer {str(first.get('tokenizer_sha256'))[:12]}. "
        f"Validation scores {first.get('val_tokens') or 0:,} tokens, each once.",
        f"Ran on: {'; '.join(dict.fromkeys(machines)) or 'not recorded'}.",
        "Time is that of optimizer steps after warm-up; a step's is the median. Attention time comes from "
        f"passes of their own. Peak memory: {first.get('peak_method')}.",
        f"Differences are paired by seed; intervals are Student's t at {LEVEL:.0%}, each for itself. A "
        "difference is called real if its paired t-test holds at 5 % after Holm's correction: over the "
        f"questions of the verdict (here {len(study.comparisons)}) and, apart from them, over the rows of the "
        f"table ({len(study.differences)}), for quality and for time. Where the interval leaves out zero and the "
        "correction does not agree, it is open. Choose the number of seeds before you look: "
        "adding seeds until something is real finds something in the end.",
        *matched,
    ]
