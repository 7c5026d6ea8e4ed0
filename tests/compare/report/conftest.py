"""What tests of reports share."""

import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from model.loss import perplexity
from train.config.compose import compose

composed = functools.cache(lambda *overrides: compose(list(overrides)))


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a finished run with this loss, and whatever else it is given."""

    def run(
        name: str, loss: float, *overrides: str, curve: list[float] | None = None, **summary: Any
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        config = composed(*overrides)
        choices = config["choices"]
        numbers = {
            "attn": choices["attn"], "pos": choices["pos"], "model": choices["model"], "seed": config["seed"],
            "n_kv_heads": {"mha": 6, "gqa": 2, "mqa": 1}[choices["attn"]], "params": 1000, "steps": 3,
            "tokens": 300, "train_loss": loss, "val_loss": loss, "val_perplexity": perplexity(loss),
            "val_bits_per_byte": loss / 2, "val_tokens": 99, "train_seconds": 10.0, "step_ms": 100.0,
            "tokens_per_second": 30.0, "attention_ms": 5.0, "peak_train_bytes": 2**20, "kernel": "matmul",
            "kv_cache_bytes_per_token": {"mha": 600, "gqa": 200, "mqa": 100}[choices["attn"]],
            "device": "cpu", "dtype": "float32", "threads": 2, "compiled": False,
            "data_fingerprint": "text", "tokenizer_sha256": "codec",
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "summary.json").write_text(json.dumps(numbers | summary))
        (folder / "status.json").write_text('{"state": "done", "reason": null, "last_step": 3}')
        steps = curve or [loss + 2 + random.random(), loss + 1, loss]
        lines = [{"step": i, "split": "train", "loss": x} for i, x in enumerate(steps, 1)]
        lines.append({"step": 3, "split": "val", "loss": loss})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return folder

    return run
