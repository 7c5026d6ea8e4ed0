"""Time of a training step on this machine, from a few real steps on random tokens, and of a run."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch

from data.corpus import prepare
from data.objective.base import Batch
from train.config.schema import Config
from train.measure import device as devices
from train.measure.timer import timed
from train.record.terminal import say
from train.setup.build import (
    build_model,
    build_objective,
    build_optimizer,
    build_source,
    clipping,
    init_model,
)
from train.setup.run_setup import check
from train.step import TrainStep

BUDGET = 3.0  # seconds of steps
MAX_STEPS = 25


def random_token_step(config: Config, vocab_size: int) -> TrainStep:
    """The training step of a config, on random tokens instead of its corpus."""
    spec = check(config)
    settings = spec.settings
    model = build_model(config, vocab_size)
    init_model(model, config, 0)
    model = model.to(spec.device.name)
    spec.device.compile(model, settings.accumulate)
    optimizer, schedule = build_optimizer(config, model, settings.steps)
    return TrainStep(
        model,
        optimizer,
        schedule,
        random_batches(vocab_size, settings.batch_size, spec.max_len),
        spec.device,
        accumulate=settings.accumulate,
        clip=clipping(clip=config["optim"]["clip"]),
        seed=settings.seed,
    )


def random_batches(vocab_size: int, rows: int, length: int) -> Callable[[int], Batch]:
    """A batch (rows, length) of random tokens, the same for every step."""
    tokens = torch.randint(vocab_size, (rows, length + 1))
    return lambda step: (tokens[:, :-1], tokens[:, 1:])


def step_seconds(config: Config, vocab_size: int, budget: float | None = None) -> float | None:
    """Seconds of one optimizer step, the fastest in `budget` seconds (BUDGET); None for a compiled model.

    Doubles the rows of a micro-batch until they are all or the time is up; the time of further rows
    is taken to grow in proportion.
    """
    spec = check(config | ({"compile": False} if config["compile"] == "auto" else {}))
    if spec.device.compiled:
        return None
    devices.set_up_process(spec.threads, spec.settings.tf32)
    # The learning rate is 0 so that nothing diverges.
    step = replace(random_token_step(config, vocab_size), schedule=lambda _: 0.0, accumulate=1)

    def with_rows(rows: int) -> Callable[[], float]:
        batches = random_batches(vocab_size, rows, spec.max_len)
        few = partial(replace(step, batches=batches), 0)
        return lambda: timed(few, spec.device)

    with_rows(1)()  # the first step is slow
    end, rows = perf_counter() + (BUDGET if budget is None else budget), 1
    processes = spec.settings.gpus if spec.device.name == "cuda" else 1  # those of a CPU share it
    each, most = spec.settings.batch_size / processes, spec.settings.rows
    while rows < most:
        attempt = with_rows(rows)
        seconds = min(attempt(), attempt())
        if perf_counter() + 4 * seconds > end:
            return seconds / rows * each
        rows = min(2 * rows, most)
    attempt = with_rows(most)
    times = [attempt()]
    while perf_counter() + times[-1] < end and len(times) < MAX_STEPS:
        times.append(attempt())
    return min(times) / most * each


def steps_of_validation(config: Config, val_tokens: int, done: int = 0) -> float:
    """Validations after `done` steps, in training steps: a forward pass takes a third of one."""
    every = config["eval_every"] or max(1, config["steps"])
    times = -(-config["steps"] // every) - done // every
    return times * val_tokens / (config["batch_size"] * config["model"]["max_len"]) / 3


def steps_within_minutes(config: Config) -> int:
    """The most steps, in tens, that fit in a config's `minutes` together with their validations.

    At most the config's `steps`, at least 10 of them. Raises ValueError for a compiled model, whose
    step cannot be timed.
    """
    vocab_size, val_tokens = corpus_of(config)
    seconds, minutes, wanted = step_seconds(config, vocab_size), config["minutes"], config["steps"]
    if seconds is None:
        raise ValueError(f"minutes={minutes:g} times a step first, which needs compile=false")

    def fits(steps: int) -> bool:
        validations = steps_of_validation(config | {"steps": steps}, val_tokens)
        return (steps + validations) * seconds <= 60 * minutes

    fewer = range(wanted - wanted % 10, 10, -10)
    steps = next((n for n in (wanted, *fewer) if fits(n)), min(wanted, 10))
    if steps < wanted:
        say(
            f"minutes={minutes:g}: {steps} steps instead of {wanted}; "
            f"a step takes {1e3 * seconds:,.0f} ms on this machine"
        )
    return steps


def corpus_of(config: Config) -> tuple[int, int]:
    """The vocabulary that a run's model has, and the tokens that one validation reads."""
    source, options = build_source(config["data"])
    corpus = prepare(source, say=say, **options)
    size = config["model"]["vocab_size"] or corpus.tokenizer.get_vocab_size()
    return size, build_objective(config, corpus).validation_tokens
