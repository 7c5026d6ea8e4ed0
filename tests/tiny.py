"""Tiny models of every variant, and the overrides of tiny runs."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from compare.check.properties import TINY, VOCAB, TinyVariant, pairs
from data.corpus import Corpus, prepare
from model.transformer import Transformer
from train.setup.build import build_model, init_model

RUN = [
    *TINY,
    "steps=12",
    "batch_size=4",
    "eval_every=5",
    "save_every=4",
    "optim.warmup=2",
    "sample.tokens=8",
    "wandb.mode=disabled",
    "threads=1",
    "device=cpu",  # whatever the machine has; tests/cuda is about GPUs
]

HANG = 600.0  # seconds after which a process is taken to hang, on the slowest of machines


@functools.cache
def working_pairs() -> list[tuple[str, str]]:
    """Every attention with every position scheme that it does not refuse. Finding them takes seconds."""
    return [pair for pair, refusal in pairs().items() if refusal is None]


def variants(test: Callable[..., None]) -> Callable[..., None]:
    """Decorates a test of an attention and a position scheme: one test for each pair that works."""
    return pytest.mark.parametrize(("attn", "pos"), working_pairs())(test)


def build(attn: str, pos: str, *overrides: str, seed: int = 0) -> Transformer:
    """A tiny initialised model of a variant, in evaluation mode."""
    config = TinyVariant(attn, pos, overrides=overrides).config()
    model = build_model(config, VOCAB)
    init_model(model, config, seed)
    return model.eval()


def eventually(condition: Callable[[], object], seconds: float = HANG) -> bool:
    """True once a condition that another process brings about holds; False if it never does."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def corpus(source: object, cache: Path, **options: object) -> Corpus:
    defaults = {"tokenizer": "char", "vocab_size": 300, "val_fraction": 0.1, "shuffle": False}
    return prepare(source, cache=str(cache), **defaults | options)


class Documents:
    """A source of given documents."""

    def __init__(self, *documents: str, val: list[str] | None = None) -> None:
        self.splits = {"train": list(documents)} | ({"val": val} if val else {})

    def key(self) -> str:
        return json.dumps(self.splits)

    def load(self) -> dict[str, list[str]]:
        return self.splits
