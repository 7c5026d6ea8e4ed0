"""Configs that earlier versions wrote, in today's spelling: the one place that knows the old ones."""

import re
from collections.abc import Callable
from typing import Any

from train.config.schema import Config

#: Classes that have moved since.
TARGETS = {
    "model.attention.latent.MLA": "model.attention.mla.MLA",
    "train.optimizer.AdamW": "train.optim.adamw.AdamW",
    "train.optimizer.Muon": "train.optim.muon.Muon",
}

#: Keys that have been renamed, by command.
COMMAND_KEYS = {
    "eval": {"against": "reference", "rows": "num_windows", "rounds": "repeats"},
    "sample": {
        "tokens": "max_new_tokens",
        "count": "num_samples",
        "overflow": "context_overflow",
    },
    "train": {
        "attn.order": "attn.pattern",
        "pos.fraction": "pos.rotary_fraction",
        "pos.original_len": "pos.original_max_len",
    },
}

#: Keys that earlier versions did not have, and what they did.
MISSING: Config = {"tf32": False, "memory": "full", "force": False}


def modernise(config: Config) -> Config:
    """A saved config as today's code would have written it."""
    config = MISSING | {key: moved(value) for key, value in config.items()}
    if isinstance(config.get("attn"), dict):
        config["attn"], choices = attention(config["attn"]), config.get("choices")
        if isinstance(choices, dict) and choices.get("attn") == "qk_norm":
            kind = "gqa" if "n_kv_heads" in config["attn"] else "mha"
            config["choices"] = choices | {"attn": kind}
    if isinstance(config.get("pos"), dict):
        keys = {"fraction": "rotary_fraction", "original_len": "original_max_len"}
        config["pos"] = {keys.get(key, key): value for key, value in config["pos"].items()}
    if isinstance(config.get("report"), dict):
        config["report"] = report_keys(config["report"])
    return config


def report_keys(saved: Config) -> Config:
    """The keys under `report` of a saved config, or of a sweep.json.

    The title once named the file of the leading figure, and the figure brought its table.
    """
    question = re.match(r"questions? (\d+)", str(saved.get("title")), re.IGNORECASE)
    before = {
        "title": None,
        "figure": None,
        "figure_file": f"question-{question[1]}" if question else None,
        "tables": ["decoding"] if saved.get("figure") == "decoding" else [],
        "notes": [],
    }
    return {key: saved.get(key, value) for key, value in before.items()}


def attention(node: Any) -> Any:
    """A node of attention, or of a pattern of it, as today's code would have written it.

    Query-key norm was a class, and the window of the class `Sliding` counted the tokens on both
    sides of one.
    """
    if not isinstance(node, dict):
        return node
    node = {"pattern" if k == "order" else k: attention(v) for k, v in node.items()}
    kind = str(node.get("_target_")).rpartition(".")[2]
    if kind == "QKNorm":
        kv_heads = node.pop("n_kv_heads", None)
        kind = "MHA" if kv_heads is None else "GQA"
        node |= {"_target_": f"model.attention.grouped.{kind}", "qk_norm": True}
        node |= {} if kv_heads is None else {"n_kv_heads": kv_heads}
    if kind == "Sliding":
        kind, window = "SlidingWindow", node.get("window")
        node["_target_"] = "model.attention.sliding_window.SlidingWindow"
        node["window"] = window // 2 + 1 if isinstance(window, int) else window
    return {"qk_norm": False} | node if kind in ("MHA", "GQA", "MQA", "SlidingWindow") else node


def current_overrides(
    command: str, overrides: list[str], notify: Callable[[str], None]
) -> list[str]:
    """Overrides of a command with today's keys; `notify` gets a line for each old one."""
    keys = COMMAND_KEYS.get(command, {})
    for old in (key for key in keys if any(o.startswith(f"{key}=") for o in overrides)):
        notify(f"note: {old}=... is now {keys[old]}=...")
    if command == "train" and "attn=qk_norm" in overrides:
        grouped = any(o.startswith("attn.n_kv_heads=") for o in overrides)
        now = [f"attn={'gqa' if grouped else 'mha'}", "attn.qk_norm=true"]
        notify(f"note: attn=qk_norm is now {' '.join(now)}")
        overrides = [*(o for o in overrides if o != "attn=qk_norm"), *now]
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
