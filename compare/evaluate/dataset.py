"""The text that runs are scored on: their own or any other, in the tokens of each run."""

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from compare.evaluate.load import LoadedRun
from data.corpus import Corpus, prepare
from train.config.schema import Config, choose
from train.record.terminal import say
from train.setup.build import build_source

SPLITS = ("val", "train", "test")
FEW_DOCUMENTS = 20  # with fewer, a bootstrap resamples blocks of the text
BLOCKS = 100


@dataclass(frozen=True)
class EvaluationText:
    """A text in the tokens of a run."""

    name: str  # val, train, test, or the name of another text
    data: Config  # the `data` node of a config that it comes from
    split: str  # of its corpus
    corpus: Corpus

    @property
    def tokens(self) -> Tensor:
        """The token ids (N,)."""
        return self.corpus.split(self.split)[0]

    @property
    def scored_bytes(self) -> int:
        """UTF-8 bytes of all tokens but the first."""
        return self.corpus.split(self.split)[1]

    @property
    def identity(self) -> dict[str, str]:
        """SHA-256 of the text with its split, and of the tokenizer."""
        return self.corpus.identity

    def bootstrap_units(self) -> tuple[str, np.ndarray, np.ndarray]:
        """The kind of unit that a bootstrap resamples, the unit of each scored token (N - 1,), and
        the bytes of each unit.

        Units are documents (an end-of-text token belongs to the document before it); of fewer than
        FEW_DOCUMENTS, blocks with equal numbers of tokens, which are assumed to have equal bytes.
        """
        scored = np.arange(1, len(self.tokens))
        documents = self.corpus.documents[self.split]
        documents = documents[documents[:, 1] > 0]
        if len(documents) >= FEW_DOCUMENTS:
            sizes = documents[:, 2].astype(float)
            sizes[0] -= sizes.sum() - self.scored_bytes  # the first token is not scored
            return "documents", np.searchsorted(documents[:, 0], scored, "right") - 1, sizes
        blocks = min(BLOCKS, len(scored))
        unit = (scored - 1) * blocks // len(scored)
        return "blocks", unit, np.bincount(unit) * self.scored_bytes / len(scored)

    def in_tokens_of(self, run: LoadedRun) -> "EvaluationText":
        """The same text in the tokens of another run."""
        if run.tokenizer_sha256 == self.identity["tokenizer_sha256"]:
            return self
        data = self.data | {"tokenizer": str(run.folder / "tokenizer.json")}
        return replace(self, data=data, corpus=corpus_of(data))


def check_split(split: str | None) -> None:
    """Raise ValueError for a split that no text has; None is the default split."""
    if split is not None:
        choose("split", split, dict.fromkeys(SPLITS))


def open_text(
    run: LoadedRun, split: str | None, other: Config | None, other_name: str | None
) -> EvaluationText:
    """The text to score a run on: a split of its own, or of `other`, a config from configs/data.

    Another text is read with the run's tokenizer; without a `split`, its validation split if its
    source has one, else all of it. Raises ValueError for a split that does not exist, and if the
    run's own text has changed since training.
    """
    data = other or run.config["data"]
    if split == "test":
        if "val_split" not in data:
            raise ValueError(
                "split=test: this text has no test split; score another with data.path=FILE"
            )
        data = data | {"split": "test", "val_split": None}
    own = other is None and split != "test"
    if not own:
        tokenizer = str(run.folder / "tokenizer.json")
        data = data | {"tokenizer": tokenizer, "val_fraction": 0.0, "shuffle": False}
    corpus = corpus_of(data)
    if own and run.checkpoint is not None:
        corpus.check_identity(run.checkpoint.state, "evaluate")
    shown = split or ("val" if own or corpus.val is not None else "all")
    part = {"all": "train", "test": "train"}.get(shown, shown)
    corpus.split(part)  # raises ValueError if it is missing
    name = shown if other is None else f"{other_name}-{corpus.fingerprint[:8]}"
    return EvaluationText(name, data, part, corpus)


def corpus_of(data: Config) -> Corpus:
    """The corpus of a config's `data` node."""
    source, options = build_source(data)
    return prepare(source, say=say, **options)
