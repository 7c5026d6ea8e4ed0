"""How long a training step takes here, from a few real ones on random tokens."""

import statistics
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any, cast

import torch

from data.batches import Batches
from train.config.schema import Config
from train.measure import device as devices
from train.setup.build import build_model, build_optimizer, init_model
from train.setup.run_setup import Job, Plan, check
from train.sweep.processes import end_with
from train.trainer import Trainer

BUDGET = 2.0  # seconds
ENOUGH = 25  # steps


def begin(threads: int | None, tf32: bool, parent: int) -> None:
    """Set up a process for probing that ends with its parent."""
    end_with(parent)
    devices.set_up(threads, tf32)


def bare_job(config: Config, vocab_size: int) -> Job:
    """The job of a config, on random tokens instead of its corpus."""
    plan = check(config)
    model = build_model(config, vocab_size)
    init_model(model, config, 0)
    model = model.to(plan.device.name)
    plan.device.compile(model, plan.settings.accumulate)
    optimizer, schedule = build_optimizer(config, model, plan.settings.steps)
    return Job(
        plan=plan,
        corpus=cast(Any, None),
        batches=random_batches(plan, vocab_size, plan.settings.batch_size),
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        clip=1.0,
        prompt=[],
        parent=None,
    )


def random_batches(plan: Plan, vocab_size: int, rows: int) -> Batches:
    text = torch.randint(vocab_size, (100_000 + plan.max_len,))
    return Batches(text, rows=rows, length=plan.max_len, seed=0, sampling="crops")


def step_seconds(config: Config, vocab_size: int) -> float | None:
    """Seconds of one optimizer step, from about two seconds of steps; None for a compiled model.

    The rows of a micro-batch double while the time lasts, and time is taken to grow with the rows
    that it did not last for.
    """
    job = bare_job(config, vocab_size)
    if job.device.compiled:
        return None
    job.schedule = cast(Any, lambda step: 0.0)  # nothing is learned, and nothing diverges
    plan, batch_size = job.plan, job.settings.batch_size
    asked = job.settings.rows

    def steps(rows: int) -> Callable[[], float]:
        job.plan = replace(plan, settings=replace(plan.settings, batch_size=rows, accumulate=1))
        job.batches = random_batches(plan, vocab_size, rows)
        trainer = Trainer(job, cast(Any, None))

        def timed() -> float:
            start = perf_counter()
            trainer.update(0)
            return perf_counter() - start

        return timed

    steps(1)()  # the first of all is slow
    end, rows = perf_counter() + BUDGET, 1
    while rows < asked:
        step = steps(rows)
        seconds = min(step(), step())
        if perf_counter() + 4 * seconds > end:
            return seconds / rows * batch_size
        rows = min(2 * rows, asked)
    step = steps(asked)
    times = [step()]
    while perf_counter() + times[-1] < end and len(times) < ENOUGH:
        times.append(step())
    return statistics.median(times) / asked * batch_size
