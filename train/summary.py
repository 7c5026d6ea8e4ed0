"""The answer of a run: what it bought and what it cost, `summary.json`."""

from typing import Any

import torch

from data import tokenizer as tokenizers
from model.cache import KVCache
from model.generate import Draw, generate
from model.transformer import Transformer
from train.measure.attention_time import attention_seconds
from train.measure.device import Device
from train.measure.memory import PEAK_METHODS, allocation_peak
from train.measure.timer import matmul_flops
from train.setup.run_setup import Job
from train.trainer import Trainer

PROFILED_STEPS = 5


def summarise(trainer: Trainer) -> dict[str, Any]:
    """All keys of a summary. Measures what the loop could not without slowing itself down.

    The measuring passes train on: call this last.
    """
    return answer(trainer, measure(trainer))


def count_only(trainer: Trainer) -> dict[str, Any]:
    """The summary of a run without steps: what can be counted, and null for all else."""
    return answer(trainer, {})


def answer(trainer: Trainer, measured: dict[str, Any]) -> dict[str, Any]:
    """The keys of a summary; null for what was not measured."""
    job, clock = trainer.job, trainer.clock
    val = trainer.validation
    trained = trainer.step > 0
    step_ms, step_ms_iqr = clock.step_ms()
    attention_ms, ceiling = measured.get("attention_ms"), measured.get("matmul_flops")
    tokens_per_second = trainer.tokens_per_second or None
    counts = count(job)
    flops = counts["flops_per_token"]
    return {
        "attn": job.plan.config["choices"]["attn"],
        "pos": job.plan.config["choices"]["pos"],
        "model": job.plan.config["choices"]["model"],
        "seed": job.settings.seed,
        **counts,
        "steps": trainer.step,
        "tokens": trainer.step * trainer.tokens_per_step,
        "train_loss": trainer.train_loss if trainer.losses else None,
        "val_loss": val.get("loss"),
        "val_perplexity": val.get("perplexity"),
        "val_bits_per_byte": val.get("bits_per_byte"),
        "val_tokens": val.get("val_tokens"),
        "start_val_loss": trainer.start_loss,
        "train_seconds": clock.train_seconds if trained else None,
        "wall_seconds": trainer.wall_seconds if trained else None,
        "warmup_seconds": clock.warmup_seconds if trained else None,
        "step_ms": step_ms,
        "step_ms_iqr": step_ms_iqr,
        "tokens_per_second": tokens_per_second,
        "mfu": flops * tokens_per_second / ceiling if tokens_per_second and ceiling else None,
        "matmul_flops": ceiling,
        "attention_ms": attention_ms,
        "attention_share": attention_ms / step_ms if attention_ms and step_ms else None,
        "peak_train_bytes": measured.get("peak_train_bytes"),
        "peak_eval_bytes": measured.get("peak_eval_bytes"),
        "peak_process_bytes": trainer.peaks.process,
        "peak_method": PEAK_METHODS.get(job.device.name) if measured else None,
        "optimizer_bytes": trainer.optimizer.nbytes if trained else None,
        "device": job.device.name,
        "dtype": job.device.dtype_name,
        "compiled": job.device.compiled,
        "threads": torch.get_num_threads(),
        **job.corpus.identity,
        "parent": job.parent,
    }


def count(job: Job) -> dict[str, Any]:
    """What follows from the model alone, exactly."""
    model, device = job.model, job.device
    params, inner = model.count_parameters()
    kernels = model.kernels(device.name, device.dtype, model.shape.max_len)
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    return {
        "n_kv_heads": one_or_all([m.n_kv_heads for m in model.mechanisms]),
        "params": params,
        "params_non_embedding": inner,
        "flops_per_token": model.flops_per_token(model.shape.max_len),
        "parameter_bytes": parameter_bytes,
        "gradient_bytes": parameter_bytes,  # float32, one for each parameter
        "kv_cache_bytes_per_token": cache_bytes_per_token(model, device),
        "kernel": one_or_all(kernels),
    }


def one_or_all(values: list[Any]) -> Any:
    """The value that all layers share, or the list of them for a pattern of layers."""
    return values[0] if len(set(values)) == 1 else values


@torch.no_grad()
def cache_bytes_per_token(model: Transformer, device: Device) -> int:
    """Bytes a token that decoding really keeps of a full context, in the run's compute dtype."""
    n = model.shape.max_len
    cache = KVCache(model.shape.n_layers, n)
    model.eval()
    with device.autocast(), device.as_written():
        model(torch.zeros(1, n, dtype=torch.int64, device=device.name), cache)
    model.train()
    return round(cache.nbytes / n)


def measure(trainer: Trainer) -> dict[str, Any]:
    """Passes outside the timed loop: attention time, memory peaks on a CPU, the matmul ceiling."""
    job, peaks = trainer.job, trainer.peaks

    def step() -> None:
        trainer.update(trainer.step)

    def evaluate() -> None:
        text = job.corpus.val if job.corpus.val is not None else job.corpus.train
        trainer.score(text[: job.settings.eval_batch_size * trainer.model.shape.max_len + 1])

    found: dict[str, Any] = {"peak_train_bytes": peaks.train, "peak_eval_bytes": peaks.eval}
    if job.device.name == "cpu":
        parameters = sum(p.nbytes for p in job.model.parameters())
        alive = parameters + job.optimizer.nbytes
        found["peak_train_bytes"] = alive + allocation_peak(step)
        if job.corpus.val is not None:
            found["peak_eval_bytes"] = alive + allocation_peak(evaluate)
    if not job.device.compiled:  # hooks would time another program than the compiled one
        seconds = attention_seconds(job.model.mechanisms, step, job.device, PROFILED_STEPS)
        found["attention_ms"] = 1e3 * seconds
    found["matmul_flops"] = matmul_flops(job.device)
    return found


def sample(job: Job) -> str:
    """Text from the final model, its prompt first."""
    wanted, codec = job.plan.sampling, job.corpus.tokenizer
    draw = Draw(temperature=wanted.temperature, top_k=wanted.top_k)
    job.model.eval()
    with job.device.autocast(), job.device.as_written():
        drawn = generate(job.model, job.prompt, wanted.tokens, draw=draw, seed=job.settings.seed)
        ids = [token for (token,) in drawn if token is not None]
    job.model.train()
    return tokenizers.decode(codec, [*job.prompt, *ids])
