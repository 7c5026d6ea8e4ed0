"""Setup of a training run: its config checked, its corpus, model and optimizer built."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from data.corpus import Corpus, Source, prepare
from data.objective.base import Objective
from data.tokenizer import encode
from model.cost import count_parameters, training_kernels
from model.transformer import Transformer
from train.config.compose import compose
from train.config.options import APART, Reporting, Sampling, Settings, Tracking
from train.config.schema import Config, arguments
from train.measure import device as devices
from train.measure.device import Device
from train.optim.optimizer import Optimizer
from train.optim.schedule import Schedule
from train.parallel.ranks import Ranks
from train.parallel.shard import shard
from train.record.run_folder import is_hf_folder, open_checkpoint, open_config, open_tokenizer
from train.record.terminal import say
from train.setup.build import (
    build_model,
    build_objective,
    build_optimizer,
    build_source,
    clipping,
    init_model,
    objective_of,
    try_model,
)
from train.setup.huggingface import differences, files_of, our_weights, overrides_of
from train.setup.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """A config that has been checked in every part, without reading the text."""

    config: Config
    settings: Settings
    sampling: Sampling
    tracking: Tracking
    device: Device
    threads: int  # of the CPU
    max_len: int  # tokens of context
    least_bytes: int  # of memory that it cannot do without
    source: Source
    corpus: dict[str, Any]  # arguments of `prepare`


@dataclass(kw_only=True)
class Job:
    """A run with its corpus, its model and its optimizer: ready to train."""

    spec: RunSpec
    corpus: Corpus
    objective: Objective
    model: Transformer
    optimizer: Optimizer
    schedule: Schedule
    clip: float
    prompt: list[int]  # what the final sample continues
    parent: dict[str, Any] | None  # the run (or folder) and step that the weights come from
    ranks: Ranks = field(default_factory=Ranks)  # the processes of the run

    @property
    def settings(self) -> Settings:
        return self.spec.settings

    @property
    def device(self) -> Device:
        return self.spec.device


def check(config: Config, *, resuming: bool = False) -> RunSpec:
    """Check every part of a config. Raises ValueError, in one line, for any mistake.

    Builds the model without memory and looks at the files of the source, but reads no corpus. A run
    that is resumed no longer needs the weights that it started from.
    """
    config = shared(config)
    scalars = {key: value for key, value in config.items() if key not in APART}
    settings = Settings(**arguments("", scalars, Settings)[0])
    sampling = Sampling(**arguments("sample", config["sample"], Sampling)[0])
    tracking = Tracking(**arguments("wandb", config["wandb"], Tracking)[0])
    Reporting(**arguments("report", config["report"], Reporting)[0])
    compiled = False if settings.sharded else settings.compile
    device = devices.select_device(settings.device, settings.dtype, compiled, settings.steps)
    if settings.sharded and device.name == "mps":
        raise ValueError("shard=full works on cpu and cuda, not on mps")
    with torch.device("meta"):
        model = build_model(config, vocab_size=1)
        build_optimizer(config, model, settings.steps)
        check_kernel(model, settings.kernel, device)
        if settings.kernel == "flex":
            check_flex(model, device, settings.deterministic)
    least = least_bytes(model, settings)
    if not settings.force:
        devices.check_memory(least, device)
    elements = settings.rows * model.shape.max_len * model.shape.dim
    try_model(config)
    config = config | vars(settings)  # numbers as their types: 1e1 rows are 10
    config["compile"] = device.compiled  # what `auto` comes to
    objective_of(config)
    source, corpus = build_source(config["data"])
    if settings.init_from is not None and not resuming:
        check_origin(settings.init_from, config)
    return RunSpec(
        config=config,
        settings=settings,
        sampling=sampling,
        tracking=tracking,
        device=device,
        threads=settings.threads or devices.choose_threads(device, elements),
        max_len=model.shape.max_len,
        least_bytes=least,
        source=source,
        corpus=corpus,
    )


def shared(config: Config) -> Config:
    """A config whose processes have a micro-batch each, unless it says how many there are."""
    gpus = config["gpus"]
    several = type(gpus) is int and gpus > 1 and config["accumulate"] == 1
    return config | {"accumulate": gpus} if several else config


def check_kernel(model: Transformer, asked: str, device: Device) -> None:
    """Raise ValueError if a layer does not train with the kernel that is asked for."""
    kernels = training_kernels(model, device.name, device.dtype, model.shape.max_len)
    for layer, kernel in enumerate(kernels):
        if asked not in ("auto", "fastest", kernel):
            name = type(model.attention_layers[layer]).__name__
            raise ValueError(f"kernel={asked}: {name} computes by {kernel} alone")
        scheme = model.position.of_layer(layer)
        if asked == "flash" and "bias" in scheme.hooks and [*scheme.parameters()]:
            name = type(scheme).__name__  # torch would leave its flash kernel without a word
            raise ValueError(f"kernel=flash has no gradient for the bias of {name}; matmul has one")


def check_flex(model: Transformer, device: Device, deterministic: bool) -> None:
    """Raise ValueError if FlexAttention cannot train a model that `check_kernel` has passed."""
    if not device.compiled:
        raise ValueError("kernel=flex needs compile=true; elsewhere it would hold all scores")
    for layer, attention in enumerate(model.attention_layers):
        scheme, name = model.position.of_layer(layer), type(attention).__name__
        if attention.prefix is not None or model.has_latents or not attention.takes_flex:
            raise ValueError(
                f"kernel=flex takes whole texts and nothing beside, which {name} does not give it; kernel=auto works"
            )
        narrow = min(attention.key_dim, attention.head_dim)
        if narrow < 16:
            raise ValueError(
                f"kernel=flex takes keys and values of at least 16 channels, not {narrow}"
            )
        if "bias" in scheme.hooks and not scheme.by_distance:
            raise ValueError(
                f"kernel=flex takes biases that depend on distance alone; {type(scheme).__name__} does not say so"
            )
        if scheme.trains_bias and deterministic:
            raise ValueError(
                f"kernel=flex adds the gradients of {type(scheme).__name__}'s bias up in any order; deterministic=true needs another"
            )


def least_bytes(model: Transformer, settings: Settings) -> int:
    """A lower bound on the bytes that training needs, whatever the attention.

    Float32 parameters, gradients and one state of the optimizer for those that are trained, the rows
    that each block asks from in two bytes, and the tokens of a batch. Of a sharded model, this
    process's part.
    """
    length, dim = model.shape.max_len, model.shape.dim
    asking = sum(model.rows(layer, length)[0] for layer in range(model.shape.n_layers))
    stream = dim * max(settings.rows * asking, settings.eval_batch_size * length)
    parts = settings.gpus if settings.sharded else 1
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) // parts
    held = 4 * (count_parameters(model)[0] // parts)
    if not settings.steps:
        return held
    return held + 8 * trained + 2 * stream + 16 * settings.batch_size * length


def check_start(before: Config, now: Config, where: str) -> None:
    """Raise ValueError unless a model can start from the weights of another; both by config."""
    with torch.device("meta"):
        old, new = build_model(before, vocab_size=1), build_model(now, vocab_size=1)
    load_weights(dict(old.named_parameters()), before, new, now["convert"], where)


def check_origin(origin: str, now: Config) -> None:
    """Raise ValueError unless a run can start from a run, or a folder of transformers.

    Of the latter without its weights: whether biases and positions are needed is told by those.
    """
    folder = Path(origin)
    if not is_hf_folder(folder):
        open_config(folder)
        return
    files_of(folder)
    overrides = overrides_of(folder)
    before = compose(overrides)
    same = {key: now["model"][key] for key in ("bias", "vocab_size")}
    before |= {"pos": now["pos"], "model": before["model"] | same}
    with hinting(overrides):
        check_start(before, now, f"init_from={origin}")


@contextmanager
def hinting(overrides: list[str]) -> Iterator[None]:
    """Add to a ValueError the overrides that would fit."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}; what fits is {' '.join(overrides)}") from error


def assemble(spec: RunSpec, *, resuming: bool = False, ranks: Ranks | None = None) -> Job:
    """Read the corpus and build everything. Raises ValueError for what does not fit together.

    The weights of a run that is resumed are left to its checkpoint.
    """
    config, settings = spec.config, spec.settings
    devices.set_up_process(spec.threads, settings.tf32, settings.deterministic)
    corpus = prepare(spec.source, say=say, **spec.corpus)
    objective = build_objective(config, corpus)
    if corpus.val is not None and len(corpus.val) < 2:
        raise ValueError("the validation text has 1 token: raise data.val_fraction, or set it to 0")
    asked = spec.sampling.prompt
    prompt = objective.prompt if asked is None else encode(corpus.tokenizer, asked)
    model = build_model(config, corpus.tokenizer.get_vocab_size())
    init_model(model, config, settings.seed)
    parent = None
    if settings.init_from and not resuming:
        parent = start_from(settings.init_from, settings.convert, config, model, corpus)
    frozen = not all(p.requires_grad for p in model.parameters())
    if frozen and not settings.init_from and settings.steps:
        say(
            "warning: frozen weights stay as drawn at random: tune goes on from a run, init_from=..."
        )
    if settings.sharded:
        shard(model, spec.device.name)
    model = model.to(spec.device.name)
    spec.device.compile(model, settings.accumulate)
    optimizer, schedule = build_optimizer(config, model, settings.steps)
    return Job(
        spec=spec,
        corpus=corpus,
        objective=objective,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        clip=clipping(clip=config["optim"]["clip"]),
        prompt=prompt,
        parent=parent,
        ranks=ranks or Ranks(),
    )


def start_from(
    origin: str, how: str, now: Config, model: Transformer, corpus: Corpus
) -> dict[str, Any]:
    """Take over the weights of a run's last checkpoint, or of a folder of transformers.

    Says where they come from, back to the start. Key and value heads become fewer as `how` says.
    Raises ValueError for weights that do not fit.
    """
    folder = Path(origin)
    if open_tokenizer(folder).to_str() != corpus.tokenizer.to_str():
        raise ValueError(
            f"init_from={origin}: tokenizer mismatch; set data.tokenizer={origin}/tokenizer.json to reuse it"
        )
    if is_hf_folder(folder):
        start_from_theirs(folder, how, now, model)
        return {"run": str(folder.resolve()), "step": None, "parent": None}
    checkpoint, before = open_checkpoint(folder), open_config(folder)
    choices = " ".join(f"{group}={before['choices'][group]}" for group in ("attn", "pos", "model"))
    load_weights(checkpoint.model(), before, model, how, f"init_from={origin} ({choices})")
    return {
        "run": str(folder.resolve()),
        "step": checkpoint.step,
        "parent": checkpoint.state["parent"],
    }


def start_from_theirs(folder: Path, how: str, now: Config, model: Transformer) -> None:
    """Take over the weights of a folder of transformers, and say where it computes something else."""
    overrides, weights = overrides_of(folder), our_weights(folder)
    before = compose(overrides)
    with hinting(overrides):
        load_weights(weights, before, model, how, f"init_from={folder}")
    there, here = differences(before, now)
    if there:
        say(f"init_from={folder}: the model there has {there}, this one {here}")
