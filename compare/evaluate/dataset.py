"""The text that runs are scored on: their own, or any other, in the tokens of each."""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from compare.evaluate.load import Opened
from data.corpus import Corpus, prepare
from data.tokenizer import sha256_of
from train.config.schema import Config
from train.record.terminal import say
from train.setup.build import build_source

SPLITS = ("val", "train", "test")
FEW = 20  # documents below which blocks of the text are resampled instead
BLOCKS = 100


@dataclass(frozen=True)
class Text:
    """A text in the tokens of a run."""

    name: str  # val, or what another text is called
    node: Config  # the data of a config that it comes from
    part: str  # of its corpus
    corpus: Corpus

    @property
    def tokens(self) -> Tensor:
        """The token ids (N,)."""
        return self.corpus.split(self.part)[0]

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of all tokens but the first."""
        return self.corpus.split(self.part)[1]

    @property
    def identity(self) -> dict[str, str]:
        """SHA-256 of the text with its split, and of the tokenizer."""
        return self.corpus.identity

    def units(self) -> tuple[str, np.ndarray, np.ndarray]:
        """What a bootstrap resamples, the unit of each scored token (N - 1,), the bytes of each unit.

        Documents, an end-of-text counted to the one before; where there are few of them, blocks of
        equal numbers of tokens, whose bytes are taken to be as many as those of the others.
        """
        scored = np.arange(1, len(self.tokens))
        rows = self.corpus.documents[self.part]
        rows = rows[rows[:, 1] > 0]
        if len(rows) >= FEW:
            sizes = rows[:, 2].astype(float)
            sizes[0] -= sizes.sum() - self.scored_bytes  # the token that is not scored
            return "documents", np.searchsorted(rows[:, 0], scored, "right") - 1, sizes
        blocks = min(BLOCKS, len(scored))
        unit = (scored - 1) * blocks // len(scored)
        return "blocks", unit, np.bincount(unit) * self.scored_bytes / len(scored)

    def in_tokens_of(self, run: Opened) -> "Text":
        """The same text as another run reads it."""
        if sha256_of(run.tokenizer_json) == self.identity["tokenizer_sha256"]:
            return self
        node = self.node | {"tokenizer": str(run.folder / "tokenizer.json")}
        return replace(self, node=node, corpus=corpus_of(node))


def open_text(run: Opened, split: str | None, other: Config | None, other_name: str | None) -> Text:
    """The text to score a run on: a split of its own, or of `other`, a node of configs/data.

    Another text is read with the run's tokenizer; without a `split`, that is its validation split if
    its source has one, else all of it. Raises ValueError for a split that is not there, and where the
    run's own text is no longer what it was.
    """
    node = other or run.config["data"]
    if split == "test":
        if "val_split" not in node:
            raise ValueError("split=test: this text has none; data.path=FILE scores another text")
        node = node | {"split": "test", "val_split": None}
    own = other is None and split != "test"
    if not own:
        codec = str(run.folder / "tokenizer.json")
        node = node | {"tokenizer": codec, "val_fraction": 0.0, "shuffle": False}
    corpus = corpus_of(node)
    if own and run.checkpoint is not None:
        corpus.check_identity(run.checkpoint.state, "evaluate")
    name = split or ("val" if own or corpus.val is not None else "all")
    part = {"all": "train", "test": "train"}.get(name, name)
    corpus.split(part)  # it must be there
    called = name if other is None else f"{other_name}-{corpus.fingerprint[:8]}"
    return Text(called, node, part, corpus)


def corpus_of(node: Config) -> Corpus:
    """The corpus of the data of a config."""
    source, options, _ = build_source({"data": node})
    return prepare(source, say=say, **options)
