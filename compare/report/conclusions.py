"""What a study says, in words: the verdict, and how its numbers were made."""

import math

from compare.cost.counts import decoding_costs
from compare.report.analysis import Comparison, Study
from compare.report.runs import Run
from compare.report.statistics import LEVEL, MANY, Difference
from compare.report.variants import BARE, Variant, plain, settings_of
from train.config.keys import HELD


def sentences(found: Study) -> list[str]:
    """The verdict: one paragraph for each question that the runs can answer."""
    said = [verdict_on(c, found) for c in found.comparisons]
    trained = [run for v in found.variants for run in v.done if run.get("steps")]
    if trained and found.ruler is None and len(found.variants) > 1:
        said.insert(0, "Quality is not compared: see the warnings.")
    if trained and said:
        said.append(limits(found, trained[0]))
    return said


def cache_savings(found: Study) -> list[str]:
    """Multiply-adds that each variant's KV cache saves, and its size: one sentence per variant."""
    return [on_the_cache(v) for v in found.variants if v.runs[0].config]


def on_the_cache(v: Variant) -> str:
    end = decoding_costs(v.runs[0].config)[-1]
    return (
        f"**{v.label}** generates with a KV cache: after {end.length:,} tokens one more takes "
        f"{end.multiply_adds:,.0f} multiply-adds in attention, {end.saved:.1%} fewer than the "
        f"{end.multiply_adds_uncached:,.0f} without it, for {end.cache_elements:,} numbers kept."
    )


def limits(found: Study, run: Run) -> str:
    """How far the verdict reaches."""
    settings = settings_of(run)
    tokens = sum(stage.get("tokens") or 0 for stage in run.stages)
    rate = (
        f"what other learning rates than {plain(settings.get('optim.lr'))} would give (experiment=lr asks)"
        if found.rate is None
        else "learning rates that were not tried"
    )
    return (
        f"What this cannot tell: other sizes than model={settings.get('model')} "
        f"({(run.get('params_non_embedding') or 0) / 1e6:,.1f}M parameters beside embeddings), longer "
        f"training than {tokens / 1e6:,.1f}M tokens, other text, or {rate}."
    )


def verdict_on(c: Comparison, found: Study) -> str:
    """What one comparison says of quality, time, cache, memory and size."""
    name = "" if c.factor in ("", *BARE) else f"{c.factor}="
    head = f"**{name}{c.level}** against **{name}{c.base}**"
    if len(c.partners) > 1:
        head += f" (over {', '.join(c.partners)})"
    parts = []
    if found.ruler and c.quality:
        parts.append(in_words(c.quality, found.ruler.name, "lowers", "raises"))
    if c.time:
        parts.append(in_words(c.time, "time of a step", "shortens", "lengthens"))
    for key, what in (("kv_cache_bytes_per_token", "the KV cache"), ("peak_train_bytes", "training memory"),
                      ("params", "parameters")):  # fmt: skip
        ratio = c.ratios.get(key)
        if ratio is not None and abs(ratio - 1) >= 0.005:
            parts.append(f"{'saves' if ratio < 1 else 'adds'} {abs(ratio - 1):.0%} of {what}")
    return f"{head}: {'; '.join(parts)}." if parts else f"{head}: nothing measured."


def in_words(d: Difference, what: str, less: str, more: str) -> str:
    """A difference of logarithms as percent, and whether it is one."""
    change = percent(d.mean)
    if d.low is None or d.high is None:
        return f"{change} {what} with one seed, which tells no difference from noise"
    seeds = f"{LEVEL:.0%} interval {percent(d.low)} to {percent(d.high)}, {d.n} seeds"
    if d.real:
        verb = less if d.mean < 0 else more
        size = f"{abs(math.expm1(d.mean)):.1%}"
        return f"{verb} {what} by {size} ({seeds})"
    beside = (
        "inside the noise" if d.low <= 0 <= d.high else "not settled once all comparisons count"
    )
    return f"{what} {beside}: {change} ({seeds}){needed(d)}"


def needed(d: Difference) -> str:
    if d.seeds_needed is None:
        return ""
    count = f"more than {MANY}" if d.seeds_needed > MANY else f"about {d.seeds_needed}"
    return f", {count} seeds would settle it"


def percent(difference: float) -> str:
    """A difference of logarithms as a change: '-4.1 %'."""
    return f"{math.expm1(difference):+.1%}"


def methods(found: Study) -> list[str]:
    """How the numbers were made, from the records."""
    done = [run for v in found.variants for run in v.done]
    if not done:
        return []
    first = done[0]
    same = sorted(
        key for key, value in settings_of(first).items()
        if key in HELD and all(plain(settings_of(run).get(key)) == plain(value) for run in done)
    )  # fmt: skip
    held = ", ".join(f"{key}={plain(settings_of(first)[key])}" for key in same)
    seeds = sorted({run.seed for run in done})
    tokens = sorted({sum(stage.get("tokens") or 0 for stage in run.stages) for run in done})
    alike = {"model.max_len", "batch_size", "data.tokenizer", "data"} <= set(same)
    batches = "both see the same batches" if alike else "batches differ where the settings do"
    where = [
        f"{environment.get('gpu') or environment.get('cpu')}, {run.get('device')}, {run.get('dtype')}, "
        f"{run.get('threads')} threads, kernel {plain(run.get('kernel'))}, torch {environment.get('torch')}, "
        f"commit {str(environment.get('git_commit'))[:12]}"
        for run in done
        if (environment := run.environment)
    ]
    said = [
        f"Held equal: {held}. Seeds {', '.join(map(str, seeds))}: parameters of equal shape that two "
        f"variants share start equal, and {batches}.",
        f"{' or '.join(f'{n:,}' for n in tokens)} training tokens a run; text "
        f"{str(first.get('data_fingerprint'))[:12]}, tokenizer {str(first.get('tokenizer_sha256'))[:12]}. "
        f"Validation scores {first.get('val_tokens') or 0:,} tokens, each once.",
        f"Ran on: {'; '.join(dict.fromkeys(where)) or 'not recorded'}.",
        "Time is that of optimizer steps after warm-up; a step's is the median. Attention time comes from "
        f"passes of their own. Peak memory: {first.get('peak_method')}.",
        f"Differences are paired by seed; intervals are Student's t at {LEVEL:.0%}, each for itself. A "
        "difference is called real if its paired t-test holds at 5 % after Holm's correction: over the "
        f"questions of the verdict (here {len(found.comparisons)}) and, apart from them, over the rows of the "
        f"table ({len(found.rows)}), for quality and for time. Where the interval leaves out zero and the "
        "correction does not agree, it is open. Choose the number of seeds before you look: "
        "adding seeds until something is real finds something in the end.",
    ]
    for v in found.variants:
        matched = v.runs[0].stages[0].config.get("matched")
        if matched:
            said.append(
                f"{v.label}: feed-forward {v.runs[0].stages[0].config['model']['ff_dim']} wide to match "
                f"{matched['budget']}; {matched['leftover']:+.2%} left over."
            )
    return said
