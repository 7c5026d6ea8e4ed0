"""One run from its config to its summary: start or resume, train, measure."""

import contextlib
import dataclasses
import errno
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from data.atomic import read_json, replace
from model.cost import count_parameters
from train.config.keys import FIXED_ON_RESUME, origin_of, select
from train.config.schema import Config
from train.measure.device import ALL_THREADS, describe, unusable_gpu
from train.parallel.ranks import Ranks, watch
from train.record.checkpoint import find, remove_unfinished
from train.record.run_folder import (
    load_summary,
    new_run_folder,
    open_config,
    refuse_other_text,
    state_of,
)
from train.record.run_log import NoRecord, Record, git_commit
from train.record.terminal import printable, say, table
from train.record.wandb_process import logged_to_wandb
from train.setup.run_setup import Job, RunSpec, assemble, check
from train.step_estimate import steps_within_minutes
from train.summary import write_results
from train.trainer import Trainer, TrainingStopped

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk
#: In torch's messages: on a CPU, on a GPU that others fill, and of cuBLAS.
NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def run_training(config: Config) -> int:
    """Start or resume the run of a config and print its results; returns the exit code.

    Raises ValueError for bad input, before anything is written.
    """
    ranks = Ranks.given()
    if ranks is None:
        return begin(config, None)
    if not ranks.leader:
        return follow(ranks)
    try:
        return begin(config, ranks)
    finally:
        ranks.dismiss()


def begin(config: Config, ranks: Ranks | None) -> int:
    """The same in the process that writes the run's files, of those that were started together."""
    config = config | ({"gpus": ranks.size} if ranks else {})
    resuming = has_checkpoint(config)
    spec = check(config, resuming=resuming)
    settings = spec.settings
    folder = Path(settings.out) if settings.out else None
    state = state_of(folder) if folder else None
    before = open_config(folder) if folder and state else None
    if before and not settings.resume:
        raise ValueError(f"out={folder} holds a run ({state}); set resume=true to continue it")
    if before and (kept := chosen_before(before, config)):
        spec = check(config := config | kept, resuming=resuming)
    if settings.minutes is not None:  # chosen once: a resumed run keeps its steps
        timed = spec.config | {"compile": config["compile"]}
        try:
            steps = before["steps"] if before else steps_within_minutes(timed)
        except (MemoryError, RuntimeError) as error:
            return failed_for_want(error, "training")
        spec = check(config | {"steps": steps}, resuming=resuming)
    if folder and before:
        spec = with_recorded_threads(spec, folder)
        refuse_changes(before, spec.config)
        refuse_other_text(folder, spec.source)
        summary = load_summary(folder)
        if state == "done" and summary and summary["steps"] == spec.settings.steps:
            say(f"{folder} is already done")
            print_answer(folder, summary)
            return 0
    record = Record(folder or new_run_folder(config))
    try:
        return lead(ranks, spec, record, resuming=resuming, resumed=state is not None)
    except OSError as error:
        if error.errno not in FULL:
            raise
        say(f"failed: {error}")
        return 3
    finally:
        record.close()


def lead(
    ranks: Ranks | None, spec: RunSpec, record: Record, *, resuming: bool, resumed: bool
) -> int:
    """Train as the process that writes the run's files, with the others if there are some."""
    if ranks is None:
        ranks = Ranks(size=spec.settings.gpus)
        if ranks.size > 1:
            ranks.start()
    code, meeting = 1, watch(ranks, not_met, patience=0.0)
    try:
        ranks.connect()
        meeting.set()
        ranks.tell((spec.config, str(record.folder), spec.threads, resuming, resumed))
        try:
            job = assemble(spec, resuming=resuming, ranks=ranks)
        except (MemoryError, RuntimeError) as error:
            return failed_for_want(error, "building the model")
        code = train_job(job, record, resumed=resumed)
        return code
    finally:
        meeting.set()
        ranks.end(well=code == 0)


def not_met(why: str) -> None:
    """End this process where another of the run has failed before all have met, for which it waits."""
    say(f"failed: {why}")
    os._exit(3)


def failed_for_want(error: Exception, doing: str) -> int:
    """Say that a run failed for want of memory, and return the exit code; raises any other error."""
    message = out_of_resource_message(error, doing)
    if message is None:
        raise error
    say(f"failed: {message}")
    return 3


def follow(ranks: Ranks) -> int:
    """Train as one of the others: the same steps, and no files."""
    ranks.connect()
    told = ranks.tell()
    if told is None:
        ranks.end(well=True)
        return 0
    config, folder, threads, resuming, resumed = told
    spec = dataclasses.replace(check(config, resuming=resuming), threads=threads)
    trainer = Trainer(assemble(spec, resuming=resuming, ranks=ranks), NoRecord(Path(folder)))
    saved = find(Path(folder))[0] if resumed else None
    if saved is not None:
        trainer.restore(saved)
    try:
        trainer.fit()
    except TrainingStopped:  # all processes stop at this step, and the leader says why
        return 0
    ranks.end(well=True)
    return 0


def chosen_before(before: Config, config: Config) -> Config:
    """What a run chose by itself when it began, and keeps: compilation, and a micro-batch for each of
    its processes, of which there may be another number now."""
    kept = {"compile": before["compile"]} if config["compile"] == "auto" else {}
    if config["accumulate"] == 1 and before["accumulate"] == before["gpus"] > 1:
        kept["accumulate"] = before["accumulate"]
    return kept


def has_checkpoint(config: Config) -> bool:
    """True if a config resumes a run that has an intact checkpoint."""
    out = config["out"]
    return config["resume"] is True and isinstance(out, str) and find(Path(out))[0] is not None


def with_recorded_threads(spec: RunSpec, folder: Path) -> RunSpec:
    """The spec with the threads that its run had, as far as there are so many, unless it names others."""
    recorded = read_json(folder / "environment.json").get("threads")
    if spec.settings.threads is not None or not isinstance(recorded, int) or recorded < 1:
        return spec
    return dataclasses.replace(spec, threads=min(recorded, ALL_THREADS))


def refuse_changes(before: Config, now: Config) -> None:
    """Raise ValueError if a key that affects training differs on resume."""
    before, now = fixed(before), fixed(now)
    for key in FIXED_ON_RESUME:
        if before.get(key) != now.get(key):
            old, new = before.get(key), now.get(key)
            if isinstance(old, dict) and isinstance(new, dict):
                name = next(k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k))
                key, old, new = f"{key}.{name}", old.get(name), new.get(name)
            raise ValueError(f"cannot resume: {key} changed from {old} to {new}")


def fixed(config: Config) -> Config:
    """The part of a config that resuming may not change."""
    return select(config | {"init_from": origin_of(config)}, FIXED_ON_RESUME)


def train_job(job: Job, record: Record, *, resumed: bool) -> int:
    """Train a job, write all files of its run and print its results; returns the exit code."""
    trainer = Trainer(job, record)
    environment = dict(
        describe(job.device),
        git_commit=git_commit(),
        processes=job.ranks.size,
        shard=job.settings.shard,
        source=job.spec.source.key(),
    )
    if resumed:
        resume(trainer, environment)
    write_start(record, job, environment)
    mirror = job.spec.tracking.mode if job.settings.steps else "disabled"
    watching = watch(job.ranks, partial(give_up, trainer))
    with logged_to_wandb(record.folder, mirror):
        try:
            fit(trainer)
            watching.set()
            job.ranks.end(well=True)
            summary = write_results(trainer)
        except TrainingStopped as stop:
            with contextlib.suppress(OSError):
                record.status(stop.state, trainer.step, str(stop))
            resumable = stop.state == "interrupted"
            hint = f"; continue with resume=true out={record.folder}" if resumable else ""
            say(f"{stop.state} after step {trainer.step}: {stop}{hint}")
            return stop.code
        finally:
            watching.set()
        print_answer(record.folder, summary)
    return 0


def give_up(trainer: Trainer, why: str) -> None:
    """End this process where another of the run has failed, and an exchange with it never ends."""
    with contextlib.suppress(OSError):
        trainer.record.status("failed", trainer.step, why)
    say(f"failed after step {trainer.step}: {why}")
    os._exit(3)


def fit(trainer: Trainer) -> None:
    """Train to the last step. The run is then saved and done, whatever happens to its results.

    Raises TrainingStopped for what ends training early; writes the status for any other error.
    """
    record = trainer.record
    try:
        if trainer.job.settings.steps:
            record.status("running", trainer.step)
            trainer.fit()
        record.status("done", trainer.step)
    except TrainingStopped:
        raise
    except BaseException as error:
        if why := trainer.job.ranks.failure(seconds=5):
            raise TrainingStopped("failed", why, 3) from error
        doing = "validating" if trainer.validating else "training"
        if message := out_of_resource_message(error, doing):
            raise TrainingStopped("failed", message, 3) from error
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        with contextlib.suppress(OSError):
            record.status(state, trainer.step, f"{type(error).__name__}: {error}")
        if isinstance(error, ValueError):  # a bug, not bad input: no exit code 2
            raise RuntimeError(f"training failed after step {trainer.step}") from error
        raise


#: Facts of environment.json without which a run does not repeat bit for bit.
SAME_BITS = (
    *("device", "cpu", "cpu_capability", "gpu", "threads"),
    *("torch", "numpy", "compiled", "shard"),
)

#: What helps where memory runs out.
MEMORY_HELPS = {
    "training": "reduce batch_size, raise accumulate or set memory=lean",
    "validating": "reduce eval_batch_size",
    "building the model": "make the model smaller, or free the device of other programs",
}


def out_of_resource_message(error: BaseException, doing: str) -> str | None:
    """The message for an error that means too little disk or memory; None for other errors."""
    if isinstance(error, OSError):  # training reads and writes the run's folder only
        return str(error)
    full = any(words in str(error) for words in NO_MEMORY)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or full:
        asked = re.search(r"allocate ([\d.]+ \w+)", str(error))
        size = f" (allocating {asked[1]})" if asked else ""
        return f"out of memory{size} while {doing}: {MEMORY_HELPS[doing]}"
    return None


def resume(trainer: Trainer, environment: dict[str, object]) -> None:
    """Restore a trainer, and the records, from the newest intact checkpoint of its run."""
    record = trainer.record
    before = read_json(record.folder / "environment.json")
    if before.get("dtype") != environment["dtype"]:
        raise ValueError(
            f"cannot resume: dtype changed from {before.get('dtype')} to {environment['dtype']}"
        )
    for key in SAME_BITS:
        was, now = before.get(key, environment[key]), environment[key]
        if was != now:
            say(f"resume: {key} changed from {was} to {now}: not bit-for-bit reproducible")
    if not environment["deterministic"]:
        say("resume: on this device runs repeat bit for bit with deterministic=true alone")
    remove_unfinished(record.folder)
    saved, problems = find(record.folder)
    for problem in problems:
        say(f"warning: {problem}; falling back to an earlier checkpoint")
    if saved is not None:
        trainer.restore(saved)
    steps, planned = trainer.job.settings.steps, open_config(record.folder)["steps"]
    if trainer.step > steps:
        raise ValueError(f"steps={steps}, but the run is already at step {trainer.step}")
    if steps != planned:
        say(f"resume: steps changed from {planned} to {steps}: the learning-rate schedule follows")
    record.cut(trainer.step if saved else -1)
    say(f"resuming {record.folder} after step {trainer.step}")


def write_start(record: Record, job: Job, environment: dict[str, object]) -> None:
    """Write and print what is known before training."""
    record.write("environment.json", environment)
    replace(record.folder / "tokenizer.json", job.corpus.tokenizer_json)
    record.metrics.touch()
    record.write("config.json", job.spec.config)  # last: with it, the folder holds a run
    choices, model = job.spec.config["choices"], job.model
    say(
        f"attn={choices['attn']} pos={choices['pos']} model={choices['model']}: "
        f"{count_parameters(model)[0]:,} parameters, vocabulary {model.shape.vocab_size:,}, "
        f"{len(job.corpus.train):,} training tokens, on {job.device.name} in {job.device.dtype_name} "
        f"with {environment['threads']} threads"
    )
    why = unusable_gpu()
    if why and job.settings.device == "auto" and job.device.name == "cpu":
        say(f"warning: {why}; the run is on the CPU")
    if matched := job.spec.config.get("matched"):
        say(
            f"match={matched['budget']}: model.ff_dim={job.spec.config['model']['ff_dim']} reaches "
            f"{matched['reached']:,.0f} of {matched['target']:,.0f} ({matched['leftover']:+.2%}), "
            "token embeddings not counted"
        )
    if "pattern" in job.spec.config["attn"]:
        say(f"layers: {', '.join(type(layer).__name__ for layer in model.attention_layers)}")


def print_answer(folder: Path, summary: dict[str, Any]) -> None:
    """Print the summary as a table, a few lines of the sample and the folder."""
    print(table(summary))
    if (folder / "sample.txt").exists():
        text = printable((folder / "sample.txt").read_text(encoding="utf-8"))
        if lines := [line for line in text.splitlines() if line.strip()]:
            print("\nsample:", *[f"  | {line}" for line in lines[:8]], sep="\n")
    print(f"\nrun: {folder}")
