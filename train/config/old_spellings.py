"""Configs that earlier versions wrote, in today's spelling: the one place that knows the old ones."""

import functools
import re
import sys
from typing import Any

from train.config.keys import MISSING
from train.config.schema import Config

#: Classes that have moved since.
TARGETS = {
    "model.attention.latent.MLA": "model.attention.mla.MLA",
    "train.optimizer.AdamW": "train.optim.adamw.AdamW",
    "train.optimizer.Muon": "train.optim.muon.Muon",
}

#: Keys of groups that have been renamed.
GROUP_KEYS = {
    "attn": {"order": "pattern"},
    "pos": {"fraction": "rotary_fraction", "original_len": "original_max_len"},
}

#: Keys that have been renamed in one command.
COMMAND_KEYS = {
    "eval": {"against": "reference", "rows": "num_windows", "rounds": "repeats"},
    "sample": {
        "tokens": "max_new_tokens",
        "count": "num_samples",
        "overflow": "context_overflow",
    },
}


def modernise(config: Config) -> Config:
    """A saved config as today's code would have written it."""
    config = MISSING | {key: moved(value) for key, value in config.items()}
    if isinstance(config.get("attn"), dict):
        config["attn"], choices = attention(config["attn"]), config.get("choices")
        if isinstance(choices, dict) and choices.get("attn") == "qk_norm":
            kind = "gqa" if "n_kv_heads" in config["attn"] else "mha"
            config["choices"] = choices | {"attn": kind}
    if isinstance(config.get("choices"), dict):
        config["choices"] = {"objective": "next", "tune": "full"} | config["choices"]
    if isinstance(config.get("model"), dict):
        config["model"] = {"latents": None, "bottleneck": None} | config["model"]
    if isinstance(config.get("pos"), dict):
        config["pos"] = with_keys(GROUP_KEYS["pos"], config["pos"])
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
        "evaluate": [],
        "claim": None,
    }
    return {key: saved.get(key, value) for key, value in before.items()}


def attention(node: Any) -> Any:
    """A node of attention, or of a pattern of it, as today's code would have written it.

    Query-key norm was a class, and the window of the class `Sliding` counted the tokens on both
    sides of one.
    """
    if not isinstance(node, dict):
        return node
    node = with_keys(GROUP_KEYS["attn"], {key: attention(value) for key, value in node.items()})
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


def with_keys(renamed: dict[str, str], node: Config) -> Config:
    """A config node with keys renamed."""
    return {renamed.get(key, key): value for key, value in node.items()}


def current_overrides(command: str, overrides: list[str]) -> list[str]:
    """The overrides of one run with today's keys; a note on stderr for each old one, once."""
    renamed = COMMAND_KEYS.get(command, {}) | {
        f"{group}.{old}": f"{group}.{new}"
        for group, keys in GROUP_KEYS.items()
        for old, new in keys.items()
    }
    current = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if re.fullmatch(r"attn(@attn\.\w+)?=qk_norm", override):
            node = key.partition("@")[2] or key
            grouped = any(o.startswith(f"{node}.n_kv_heads=") for o in overrides)
            now = [f"{key}={'gqa' if grouped else 'mha'}", f"{node}.qk_norm=true"]
            note(f"{override} is now {' '.join(now)}")
            current += now
        elif key in renamed:
            note(f"{key}=... is now {renamed[key]}=...")
            current.append(f"{renamed[key]}{equals}{value}")
        else:
            current.append(override)
    return current


@functools.cache
def note(text: str) -> None:
    """Print a note, once a process: a sweep reads the same override many times."""
    print(f"note: {text}", file=sys.stderr)


def moved(node: Any) -> Any:
    """A node with the classes that it names where they are now."""
    if isinstance(node, dict):
        return {
            key: TARGETS.get(value, value) if key == "_target_" else moved(value)
            for key, value in node.items()
        }
    return node
