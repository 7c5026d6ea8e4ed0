"""Configs that earlier versions wrote, in today's spelling: the one place that knows the old ones."""

from typing import Any

from train.config.schema import Config

#: Classes that have moved since.
TARGETS = {
    "model.attention.latent.MLA": "model.attention.mla.MLA",
    "model.attention.sliding.Sliding": "model.attention.sliding_window.Sliding",
    "train.optimizer.AdamW": "train.optim.adamw.AdamW",
    "train.optimizer.Muon": "train.optim.muon.Muon",
}

#: Keys that earlier versions did not have, and what they did.
MISSING: Config = {"tf32": False, "memory": "full", "force": False}


def modernise(config: Config) -> Config:
    """A saved config as today's code would have written it."""
    return MISSING | {key: moved(value) for key, value in config.items()}


def moved(node: Any) -> Any:
    """A node with the classes that it names where they are now."""
    if isinstance(node, dict):
        return {
            key: TARGETS.get(value, value) if key == "_target_" else moved(value)
            for key, value in node.items()
        }
    return node
