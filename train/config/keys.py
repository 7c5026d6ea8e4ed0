"""Keys of train.yaml: one table of what each is to a run, to resuming, to sweeps and to reports."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train.config.schema import Config

Role = Literal["variant", "run", "record"]
ALWAYS = object()  # in the place of a value before: the key has always existed
FULL = {"_target_": "model.tuning.full.Full"}
NEXT_TOKEN = {"_target_": "data.objective.next_token.NextToken"}


@dataclass(frozen=True, kw_only=True)
class Key:
    """What a top-level key of a config is for.

    Its role is one of three:

    - variant: losses, time or memory follow from it, so a report may compare by it;
    - run: it tells the runs of one variant apart;
    - record: where a run lies, what is kept of it, how a sweep goes about it. No result follows
      from it. A sweep that is started again with another value trains nothing again.
    """

    role: Role
    resumable: bool = False  # may change when a run is resumed, as records always may
    step_time: bool = False  # decides how long a step takes on a given machine
    lossless: bool = False  # changes no bit of any loss
    shared: bool = False  # one value for all runs of a sweep
    only_with: str = ""  # the key without which it has no effect
    ignored: tuple[str, ...] = ()  # keys inside it that have no effect
    held: str = ""  # what a report says of it where all runs are alike
    before: Any = ALWAYS  # the value that runs had before the key existed


KEYS = {
    "choices": Key(role="variant", ignored=("experiment",)),  # the names that a report shows
    "attn": Key(role="variant", step_time=True),
    "pos": Key(role="variant", step_time=True),
    "model": Key(
        role="variant",
        step_time=True,
        held="model model.dim model.n_layers model.n_heads model.max_len model.dropout",
    ),
    "data": Key(role="variant", ignored=("cache",), held="data data.tokenizer"),
    "objective": Key(role="variant", held="objective", before=NEXT_TOKEN),
    "tune": Key(role="variant", step_time=True, held="tune", before=FULL),
    "optim": Key(role="variant", step_time=True, held="optim optim.lr optim.schedule"),
    "plan": Key(role="record"),
    "sweep": Key(role="record"),
    "stages": Key(role="record"),  # a stage is a run of its own, see init_from
    "first_stage": Key(role="record", before=1),  # as stages
    "jobs": Key(role="record", shared=True),  # changes times, which each run records
    "seeds": Key(role="record", shared=True, before=None),
    "margin": Key(role="record", shared=True, before=0.01),
    "retry": Key(role="record", shared=True),
    "baseline": Key(role="record"),
    "match": Key(role="record"),  # the width that it leads to is model.ff_dim
    "matched": Key(role="record"),
    "out": Key(role="record", shared=True),
    "name": Key(role="record", shared=True),
    "seed": Key(role="run"),
    "steps": Key(role="variant", resumable=True, held="steps"),
    "minutes": Key(role="record", before=None),  # the steps that fit into it are recorded as steps
    "batch_size": Key(role="variant", step_time=True, held="batch_size"),
    "accumulate": Key(role="variant", step_time=True),
    "eval_every": Key(role="record"),  # outside the clock, and the last step is always validated
    "eval_batch_size": Key(role="record"),
    "save_every": Key(role="record"),
    "keep": Key(role="record"),
    "log_every": Key(role="record"),
    "resume": Key(role="record"),
    "init_from": Key(role="run"),
    "convert": Key(role="variant", only_with="init_from", before="mean"),
    # Another machine may finish a run, which then says that it is not the same bit for bit.
    "device": Key(role="variant", resumable=True, step_time=True),
    "dtype": Key(role="variant", step_time=True, held="dtype"),
    # Threads and TF32 are set for a whole process: runs timed in turn cannot differ in them.
    "threads": Key(role="variant", resumable=True),
    "gpus": Key(role="variant", resumable=True, step_time=True, before=1),
    "shard": Key(role="variant", resumable=True, step_time=True, before="none"),
    "tf32": Key(role="variant", before=False),
    "deterministic": Key(role="variant", step_time=True, before=False),
    "compile": Key(role="variant", step_time=True),
    "force": Key(role="record", before=False),  # to try what does not fit; what fits is the same
    "memory": Key(role="variant", resumable=True, step_time=True, lossless=True, before="full"),
    "kernel": Key(role="variant", step_time=True, before="auto"),
    "sample": Key(role="record"),
    "wandb": Key(role="record"),
    "report": Key(role="record", shared=True),
}


def named(has: Callable[[Key], object]) -> list[str]:
    """The keys whose row has a property, in the order of the table."""
    return [name for name, key in KEYS.items() if has(key)]


IDENTITY = named(lambda key: key.role != "record")
FACTORS = named(lambda key: key.role == "variant")
FIXED_ON_RESUME = named(lambda key: key.role != "record" and not key.resumable)
STEP_TIME = named(lambda key: key.step_time)
LOSSLESS = named(lambda key: key.lossless)
SHARED = named(lambda key: key.shared)
HELD = [name for key in KEYS.values() for name in key.held.split()]
MISSING = {name: KEYS[name].before for name in named(lambda key: key.before is not ALWAYS)}


def select(config: Config, names: Collection[str]) -> Config:
    """The values that a config has for these keys, without those that have no effect in it."""
    return {
        name: without(config[name], KEYS[name].ignored)
        for name in names
        if name in config and (not (other := KEYS[name].only_with) or config.get(other))
    }


def without(value: Any, ignored: Collection[str]) -> Any:
    """A config value without keys inside it."""
    return {k: v for k, v in value.items() if k not in ignored} if ignored else value


def origin_of(config: Config) -> str | None:
    """The folder whose weights a run starts from, absolute; None for fresh weights."""
    return config["init_from"] and str(Path(config["init_from"]).resolve())
