"""Results of a run: its quality, time and memory, `summary.json`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from data import tokenizer as tokenizers
from model.cost import count_parameters, flops_per_token, training_kernels
from model.generate import Sampler, generate
from train.measure.attention_time import attention_seconds
from train.measure.memory import allocation_peak
from train.measure.timer import matmul_flops_per_second
from train.parallel.shard import bytes_here
from train.record.terminal import say
from train.setup.run_setup import Job
from train.trainer import Trainer, TrainingStopped

PROFILED_STEPS = 5


def write_results(trainer: Trainer) -> dict[str, Any]:
    """Write the summary and the sample of a run that is done, measure it, write the summary again.

    What fails is a warning and, in the summary, null; so is what takes a pass through a sharded
    model, of which one process has a part. Raises TrainingStopped on a signal.
    """
    folder = trainer.record.folder
    summary = summarise(trainer)
    with trainer.signals():
        with warned("no summary"):
            trainer.record.write("summary.json", summary)
        if trainer.step and not trainer.job.settings.sharded:
            with warned("no sample"):
                (folder / "sample.txt").write_text(sample(trainer), encoding="utf-8")
        summary |= measure(trainer, summary)
        with warned("no measurements in the summary"):
            trainer.record.write("summary.json", summary)
    return summary


@contextmanager
def warned(missing: str) -> Iterator[None]:
    """Context whose failure is a warning: the run is complete without what is missing."""
    try:
        yield
    except TrainingStopped:
        raise
    except Exception as error:  # noqa: BLE001
        say(f"warning: {missing} ({in_one_line(error)})")


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def summarise(trainer: Trainer) -> dict[str, Any]:
    """All keys of a summary; null for those that `measure` adds."""
    job, timer = trainer.job, trainer.timer
    val = trainer.validation
    trained = trainer.step > 0
    peaks_known = trained and not (job.settings.sharded and job.device.name == "cpu")
    step_ms, step_ms_iqr = timer.step_ms()
    return {
        "attn": job.spec.config["choices"]["attn"],
        "pos": job.spec.config["choices"]["pos"],
        "model": job.spec.config["choices"]["model"],
        "seed": job.settings.seed,
        **count(job),
        "steps": trainer.step,
        "tokens": trainer.step * trainer.tokens_per_step,
        "train_loss": trainer.train_loss if trainer.losses else None,
        "val_loss": val.get("loss"),
        "val_perplexity": val.get("perplexity"),
        "val_bits_per_byte": val.get("bits_per_byte"),
        "val_tokens": val.get("val_tokens"),
        "entropy_floor": entropy_floor(job),
        "start_val_loss": trainer.start_loss,
        "train_seconds": timer.train_seconds if trained else None,
        "wall_seconds": trainer.wall_seconds if trained else None,
        "warmup_seconds": timer.warmup_seconds if trained else None,
        "step_ms": step_ms,
        "step_ms_iqr": step_ms_iqr,
        "tokens_per_second": trainer.tokens_per_second or None,
        "mfu": None,
        "matmul_flops": None,
        "attention_ms": None,
        "attention_share": None,
        "peak_train_bytes": trainer.peaks.train,
        "peak_eval_bytes": trainer.peaks.eval,
        "peak_process_bytes": trainer.peaks.process,
        "peak_reserved_bytes": trainer.peaks.reserved,
        "peak_method": trainer.peaks.method(job.device) if peaks_known else None,
        "optimizer_bytes": trainer.optimizer.nbytes if trained else None,
        "device": job.device.name,
        "dtype": job.device.dtype_name,
        "compiled": job.device.compiled,
        "threads": torch.get_num_threads(),
        **job.corpus.identity,
        "parent": job.parent,
    }


def entropy_floor(job: Job) -> float | None:
    """Validation loss of a perfect model with the run's context, in nats per token; None if unknown.

    With latents, validation reads windows that overlap.
    """
    return None if job.model.shape.latents else job.objective.validation_floor


def count(job: Job) -> dict[str, Any]:
    """Exact counts, from the model alone; bytes are those that this process holds."""
    model, device = job.model, job.device
    params, inner = count_parameters(model)
    kernels = training_kernels(model, device.name, device.dtype, model.shape.max_len)
    trained = [p for p in model.parameters() if p.requires_grad]
    return {
        "n_kv_heads": one_or_all([m.n_kv_heads for m in model.attention_layers]),
        "params": params,
        "params_non_embedding": inner,
        "params_trained": sum(p.numel() for p in trained),
        "flops_per_token": flops_per_token(model, model.shape.max_len),
        "parameter_bytes": sum(map(bytes_here, model.parameters())),
        "gradient_bytes": sum(map(bytes_here, trained)),  # float32, as the parameters
        "kv_cache_bytes_per_token": None,
        "kernel": one_or_all(kernels),
    }


def one_or_all(values: list[Any]) -> Any:
    """The value shared by all layers, or the list of values for a pattern of layers."""
    return values[0] if len(set(values)) == 1 else values


@contextmanager
def inference(job: Job) -> Iterator[None]:
    """Context of a model in evaluation mode, not compiled, in the run's dtype."""
    job.model.eval()
    try:
        with job.device.autocast(), job.device.eager():
            yield
    finally:
        job.model.train()


@torch.no_grad()
def cache_bytes_per_token(job: Job) -> int:
    """KV-cache bytes per token at full context, as allocated, in the run's compute dtype."""
    n = job.model.shape.max_len
    cache = job.model.new_cache(n)
    with inference(job):
        job.model(torch.zeros(1, n, dtype=torch.int64, device=job.device.name), cache)
    return round(cache.nbytes / n)


def measure(trainer: Trainer, summary: dict[str, Any]) -> dict[str, Any]:
    """The keys of a summary that take passes of their own; those that fail are left out.

    The passes take more training steps, which change the weights in memory, not those saved.
    Raises TrainingStopped on a signal.
    """
    passes = measuring_passes(trainer, summary)
    measured: dict[str, Any] = {}
    for key, measuring_pass in passes.items():
        try:
            measured[key] = measuring_pass()
        except TrainingStopped:
            raise
        except Exception as error:  # noqa: BLE001  the run is complete without it
            trainer.optimizer.zero_grad()
            reason = in_one_line(error)
    if missing := [key for key in passes if key not in measured]:
        say(f"warning: not measured: {', '.join(missing)} ({reason})")
    summary = summary | measured
    if summary["attention_ms"] and summary["step_ms"]:
        measured["attention_share"] = summary["attention_ms"] / summary["step_ms"]
    if summary["matmul_flops"] and summary["tokens_per_second"]:
        # Of the FLOP/s measured in a large product, not of the vendor's peak.
        flops = summary["flops_per_token"] * summary["tokens_per_second"]
        measured["mfu"] = flops / summary["matmul_flops"]
    if trainer.step:
        measured["wall_seconds"] = trainer.wall_seconds
    return measured


def measuring_passes(trainer: Trainer, summary: dict[str, Any]) -> dict[str, Callable[[], float]]:
    """The measuring passes of the run's device, by key of the summary."""
    job = trainer.job
    passes: dict[str, Callable[[], float]] = {}
    if not job.model.has_latents and not job.settings.sharded:
        passes["kv_cache_bytes_per_token"] = partial(cache_bytes_per_token, job)
    if not trainer.step:
        return passes
    passes["matmul_flops"] = lambda: matmul_flops_per_second(job.device)
    if job.settings.sharded:
        return passes
    alive = summary["parameter_bytes"] + summary["optimizer_bytes"]

    def step() -> None:
        trainer.update(trainer.step)
        trainer.check_signal(save=False)

    def attention_ms() -> float:
        return 1e3 * attention_seconds(job.model.attention_layers, step, job.device, PROFILED_STEPS)

    if job.device.name == "cpu":
        passes["peak_train_bytes"] = lambda: alive + allocation_peak(step)
        if job.corpus.val is not None:
            score = partial(trainer.score, first_batch=True)
            passes["peak_eval_bytes"] = lambda: alive + allocation_peak(score)
    # With hooks a compiled program would be another, and latents ask past them.
    if not job.device.compiled and not job.model.has_latents:
        passes["attention_ms"] = attention_ms
    return passes


def sample(trainer: Trainer) -> str:
    """Text generated by the final model, after its prompt. Raises TrainingStopped on a signal."""
    job = trainer.job
    wanted, text = job.spec.sampling, list(job.prompt)
    sampler = Sampler(temperature=wanted.temperature, top_k=wanted.top_k)
    with inference(job):
        for (token,) in generate(
            job.model, job.prompt, wanted.tokens, sampler=sampler, seed=job.settings.seed
        ):
            trainer.check_signal(save=False)
            if token is not None:
                text.append(token)
    return tokenizers.decode(job.corpus.tokenizer, text)
