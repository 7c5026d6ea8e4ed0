"""Configs that earlier versions wrote, in today's spelling: the one place that knows the old ones."""

from collections.abc import Callable
from typing import Any

from train.config.schema import Config

#: Classes that have moved since.
TARGETS = {
    "model.attention.latent.MLA": "model.attention.mla.MLA",
    "model.attention.sliding.Sliding": "model.attention.sliding_window.Sliding",
    "train.optimizer.AdamW": "train.optim.adamw.AdamW",
    "train.optimizer.Muon": "train.optim.muon.Muon",
}

#: Keys of eval.yaml and sample.yaml that have been renamed, by command.
COMMAND_KEYS = {
    "eval": {"against": "reference", "rows": "num_windows", "rounds": "repeats"},
    "sample": {
        "tokens": "max_new_tokens",
        "count": "num_samples",
        "overflow": "context_overflow",
    },
}

#: Keys that earlier versions did not have, and what they did.
MISSING: Config = {"tf32": False, "memory": "full", "force": False}


def modernise(config: Config) -> Config:
    """A saved config as today's code would have written it."""
    return MISSING | {key: moved(value) for key, value in config.items()}


def current_overrides(
    command: str, overrides: list[str], notify: Callable[[str], None]
) -> list[str]:
    """Overrides of a command with today's keys; `notify` gets a line for each old one."""
    keys = COMMAND_KEYS.get(command, {})
    for old in (key for key in keys if any(o.startswith(f"{key}=") for o in overrides)):
        notify(f"note: {old}=... is now {keys[old]}=...")
    parts = (override.partition("=") for override in overrides)
    return ["".join((keys.get(key, key), *value)) for key, *value in parts]


def moved(node: Any) -> Any:
    """A node with the classes that it names where they are now."""
    if isinstance(node, dict):
        return {
            key: TARGETS.get(value, value) if key == "_target_" else moved(value)
            for key, value in node.items()
        }
    return node
