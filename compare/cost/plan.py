"""Cost of runs before anything is trained: python train.py plan=true ..."""

import re

from compare.cost.counts import cost, training_bytes
from compare.cost.gpus import Gpu, counted_here, gpu_of
from train.config.keys import FACTORS, select
from train.config.schema import Config
from train.measure import device as devices
from train.parallel.parent import workers
from train.record.terminal import columns, duration, number, say, tracked
from train.setup.run_setup import check
from train.step_estimate import BUDGET, corpus_of, step_seconds, steps_of_validation


def plan(runs: list[tuple[str, Config]]) -> int:
    """Print the costs of every run, by name: what training takes, and what decoding does.

    Runs that differ in their seed alone are counted and probed once.
    """
    gpus = [gpu_of(config) for _, config in runs]
    planned = [
        (name, gpu, check(counted_here(config, gpu) if gpu else config | {"force": True}).config)
        for (name, config), gpu in zip(runs, gpus, strict=True)
    ]
    known: dict[str, tuple[list[str], list[str], float | None]] = {}
    training, decoding, seconds = [], [], []
    here = f"; a probe of {BUDGET:g} seconds for each that differs" if None in gpus else ""
    say(f"counting {len(runs)} runs{here}")
    for name, gpu, config in tracked(planned, "plan"):
        if (key := repr((gpu, select(config, FACTORS)))) not in known:
            known[key] = rows_of(config, gpu)
        costs, decodes, took = known[key]
        name = name if len(runs) > 1 else " ".join(config["choices"][g] for g in ("attn", "pos"))
        training.append([name, *costs])
        decoding.append([name, *decodes])
        seconds.append(took)
    lengths = sorted({int(config["model"]["max_len"]) for _, _, config in planned})
    print(columns([TRAINING, *training]))
    for gpu in dict.fromkeys(gpu for gpu in gpus if gpu):
        print(
            f"{gpu.name}: {gpu.memory / 2**20:,.0f} MiB; counted by the kernels of a CPU, not timed"
        )
    after = " or ".join(f"{length:,}" for length in lengths)
    print(f"\none more token after {after}, all layers; attention in multiply-adds")
    print(columns([DECODING, *decoding]))
    if len(runs) > 1 and None not in seconds:
        print(f"\ntraining time of all: {duration(sum(s for s in seconds if s is not None))}")
    return 0


TRAINING = "run|parameters|MFLOP/token|PFLOP|peak MiB|activations MiB|step ms|training".split("|")
DECODING = "run|MFLOP|attention|without cache|KV elements|KV bytes|KV bytes/token".split("|")


def rows_of(config: Config, gpu: Gpu | None) -> tuple[list[str], list[str], float | None]:
    """The cells of a run in both tables, and its seconds of training.

    What cannot fit in memory is neither traced for its peak, of which there is a lower bound, nor
    probed.
    """
    spec = check(config | {"force": True})
    vocab_size = vocabulary(config)
    counted = cost(config, vocab_size, spec.device)
    there = gpu.memory if gpu else devices.memory_bytes(spec.device)
    fits = there is None or spec.least_bytes < there
    held = training_bytes(config, vocab_size, spec.device) if fits else None
    fits = held is not None and (there is None or held["total"] < there)
    step = step_seconds(config, vocab_size) if fits and gpu is None else None
    took = None if step is None else step * config["steps"]
    timed = "fits" if gpu else number(None if step is None else 1e3 * step, ",.1f")
    tokens = config["steps"] * config["batch_size"] * counted.length
    training = [
        f"{counted.params:,}",
        f"{counted.flops_per_token / 1e6:,.2f}",
        f"{counted.flops_per_token * tokens / 1e15:,.3f}",
        f"{held['total'] / 2**20:,.1f}" if held else f"over {spec.least_bytes / 2**20:,.0f}",
        f"{held['activations'] / 2**20:,.1f}" if held else "-",
        timed if fits else "does not fit",
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
    return training, decoding if counted.caches else ["-"] * len(decoding), took


QUICK = 0.5  # seconds of steps of a variant; the pace of a sweep's first run corrects them
OVERHEAD = 10.0  # seconds of a run to start, to measure what the loop does not, and to save


def forecast(runs: list[tuple[str, Config]], jobs: int) -> dict[str, float]:
    """Say what a sweep is about to do: its variants, their parameters, and the time it may take.

    The time is that of training, of validations at the speed of training's forward pass, and some
    seconds more for each run. Returns the seconds of each run by its name, where they are known.
    """
    variants: dict[str, list[tuple[str, Config]]] = {}
    for name, config in runs:
        variants.setdefault(repr(select(config, FACTORS)), []).append((name, config))
    same = list(variants.values())
    sizes = [corpus_of(config) for (_, config), *_ in same]
    say(f"{len(runs)} runs of {len(same)} variants; timing a few steps of each")
    models = [(config, vocab) for ((_, config), *_), (vocab, _) in zip(same, sizes, strict=True)]
    steps = probed(models)
    rows = [["variant", "runs", "parameters", "step ms", "each"]]
    total, seconds = 0.0, dict[str, float]()
    for (first, *others), (vocab, tokens), step in zip(same, sizes, steps, strict=True):
        name, config = first
        device = devices.select_device(
            config["device"], config["dtype"], config["compile"], config["steps"]
        )
        times = config["steps"] + steps_of_validation(config, tokens)
        took = OVERHEAD + (0.0 if step is None else step * times)
        total += took * (1 + len(others))
        if step is not None:
            seconds |= {run: took for run, _ in (first, *others)}
        name = re.sub(r"_?seed-\d+", "", name).strip("_") or name
        cells = [f"{1 + len(others)}", f"{cost(config, vocab, device).params:,}"]
        cells.append(number(None if step is None else 1e3 * step, ",.1f"))
        rows.append([name, *cells, "not known" if step is None else duration(took)])
    say(columns(rows))
    least = "at least" if None in steps else "about"
    order = "one after the other" if jobs == 1 else f"{jobs} side by side"
    say(f"{len(runs)} runs {order}: {least} {duration(total / jobs)}")
    return seconds


def probed(models: list[tuple[Config, int]]) -> list[float | None]:
    """Seconds of a step of each config with its vocabulary; None where it cannot be told.

    In a process apart: what crashes there is for the sweep to find out, not for its plan.
    """
    found: list[float | None] = []
    pool = None
    for config, vocab_size in tracked(models, "timing"):
        if not config["steps"]:
            found.append(0.0)
            continue
        pool = pool or workers()
        try:
            found.append(pool.submit(step_seconds, config, vocab_size, QUICK).result())
        except (Exception, SystemExit):  # noqa: BLE001  a broken pool, or no memory for it
            found.append(None)
            pool.shutdown(wait=False, cancel_futures=True)
            pool = None
    if pool:
        pool.shutdown()
    return found


def vocabulary(config: Config) -> int:
    """The vocabulary that a run's model has: its own, or that of its corpus, which is read."""
    given = config["model"]["vocab_size"]
    return corpus_of(config)[0] if given is None else int(given)
