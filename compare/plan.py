"""What runs would cost, before anything is trained: python train.py plan=true ..."""

from train.config import Config


def plan(runs: list[tuple[str, Config]]) -> int:
    """Print the costs of every run, by name: what training takes, and what decoding does.

    Runs that differ in their seed alone are counted and probed once.
    """
    from rich.progress import track

    from compare.probe import BUDGET
    from train import device as devices
    from train.job import check
    from train.progress import CONSOLE, columns, say

    runs = [(name, check(config).config) for name, config in runs]
    devices.set_up(runs[0][1]["threads"])
    known: dict[str, tuple[list[str], list[str], float | None]] = {}
    training, decoding, seconds = [], [], []
    say(f"counting {len(runs)} runs; a probe of {BUDGET:g} seconds for each that differs")
    for name, config in track(runs, "plan", console=CONSOLE, disable=not CONSOLE.is_terminal):
        same = {key: value for key, value in config.items() if key not in ("seed", "out", "name")}
        if (key := repr(same)) not in known:
            known[key] = rows_of(config)
        costs, decodes, took = known[key]
        name = name if len(runs) > 1 else " ".join(config["choices"][g] for g in ("attn", "pos"))
        training.append([name, *costs])
        decoding.append([name, *decodes])
        seconds.append(took)
    lengths = sorted({int(config["model"]["max_len"]) for _, config in runs})
    print(columns([TRAINING, *training]))
    after = " or ".join(f"{length:,}" for length in lengths)
    print(f"\none more token after {after}, all layers; attention in multiply-adds")
    print(columns([DECODING, *decoding]))
    if len(runs) > 1 and None not in seconds:
        print(f"\ntraining time of all: {duration(sum(s for s in seconds if s is not None))}")
    return 0


TRAINING = "run|parameters|MFLOP/token|PFLOP|peak MiB|activations MiB|step ms|training".split("|")
DECODING = "run|MFLOP|attention|without cache|KV elements|KV bytes|KV bytes/token".split("|")


def rows_of(config: Config) -> tuple[list[str], list[str], float | None]:
    """The cells of a run in both tables, and its seconds of training."""
    from compare.cost import cost, training_bytes
    from compare.probe import step_seconds
    from train.device import memory_bytes, pick
    from train.progress import number

    device = pick(config["device"], config["dtype"], config["compile"])
    vocab_size = vocabulary(config)
    counted = cost(config, vocab_size, device)
    held = training_bytes(config, vocab_size, device)
    there = memory_bytes(device)
    fits = there is None or held["total"] < there
    step = step_seconds(config, vocab_size) if fits else None
    took = None if step is None else step * config["steps"]
    tokens = config["steps"] * config["batch_size"] * counted.length
    training = [
        f"{counted.params:,}",
        f"{counted.flops_per_token / 1e6:,.2f}",
        f"{counted.flops_per_token * tokens / 1e15:,.3f}",
        f"{held['total'] / 2**20:,.1f}",
        f"{held['activations'] / 2**20:,.1f}",
        number(None if step is None else 1e3 * step, ",.1f") if fits else "does not fit",
        "-" if took is None else duration(took),
    ]
    decoding = [
        f"{counted.decode_flops / 1e6:,.3f}",
        f"{counted.attention_flops / 2:,.0f}",
        f"{counted.attention_flops_uncached / 2:,.0f}",
        f"{counted.cache_elements:,}",
        f"{counted.cache_bytes:,}",
        f"{round(counted.cache_bytes / counted.length):,}",
    ]
    return training, decoding, took


def vocabulary(config: Config) -> int:
    """The vocabulary that a run's model has: its own, or that of its corpus, which is read."""
    from data.corpus import prepare
    from train.build import build_source
    from train.progress import say

    if config["model"]["vocab_size"] is not None:
        return int(config["model"]["vocab_size"])
    source, options, _ = build_source(config)
    return prepare(source, say=say, **options).tokenizer.get_vocab_size()


def duration(seconds: float) -> str:
    """'45 s', '12 min', '3.4 h'."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
