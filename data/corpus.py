"""A corpus: text tokenised once into a memory-mapped file, with its tokenizer, cached by fingerprint."""

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from data import tokenizer as tokenizers
from data.atomic import publish, verify

VERSION = 1  # of the cache's layout and of everything that shapes its tokens
PIECE = 1 << 18  # characters tokenised at once
SAFE_CUT = re.compile(r"\S\n(?=\S)")  # a cut here changes no byte-level BPE token


class Source(Protocol):
    def key(self) -> str: ...
    def load(self) -> dict[str, list[str]]: ...


@runtime_checkable
class KnownSource(Source, Protocol):
    """A source that knows how likely its text is.

    `floor` gives the nats of a perfect model for each character of its documents, and the nats that
    the rest of the document costs more if the model begins to read there: (N, 2).
    """

    def floor(self, documents: list[str]) -> np.ndarray: ...


@dataclass(frozen=True)
class Corpus:
    """The tokens of a training and a validation split, and what is needed to read them.

    `train` and `val` (None without a validation split) are memory-mapped 1-D integer tensors.
    `floor` is that of a `KnownSource` for each token of `val`, if a token is a character; else None.
    """

    train: Tensor
    val: Tensor | None
    tokenizer: Tokenizer
    tokenizer_json: str
    fingerprint: str  # SHA-256 of the text and its split, whatever the tokenizer
    documents: dict[str, np.ndarray]  # per split, rows of (first token, tokens, bytes)
    floor: np.ndarray | None = None

    def split(self, name: str) -> tuple[Tensor, int]:
        """The tokens of `train` or `val`, and the UTF-8 bytes of all that can be scored.

        The first token of a text has no context, so its bytes do not count either.
        Raises ValueError for a split that the corpus does not have.
        """
        tokens = {"train": self.train, "val": self.val}[name]
        if tokens is None:
            raise ValueError(
                f"the corpus has no {name} split: it would be empty, see data.val_fraction"
            )
        first = tokenizers.bytes_of(self.tokenizer, int(tokens[0]))
        return tokens, int(self.documents[name][:, 2].sum()) - first

    @property
    def identity(self) -> dict[str, str]:
        """The identity of these tokens, as runs record it."""
        return {
            "data_fingerprint": self.fingerprint,
            "tokenizer_sha256": tokenizers.sha256_of(self.tokenizer_json),
        }

    def check_identity(self, recorded: Mapping[str, str], doing: str) -> None:
        """Raise ValueError, naming the operation `doing`, if a run began with other tokens."""
        for key, now in self.identity.items():
            if recorded[key] != now:
                raise ValueError(f"{doing}: {key} is {now}, but the run began with {recorded[key]}")


def prepare(
    source: Source,
    *,
    tokenizer: str,
    vocab_size: int,
    val_fraction: float,
    shuffle: bool,
    cache: str,
    say: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """The corpus of a source, read from the cache or built there.

    A source without a validation split of its own gives up the last `val_fraction` of its
    characters (of its documents, if it has `whole_documents`), after shuffling its documents once
    (always in the same way) if `shuffle`. Processes that need the same corpus at once build it once.
    Raises ValueError for text that cannot be used, and for a tokenizer that does not give the text back.
    """
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction={val_fraction} must be at least 0 and below 1")
    tokenizers.check(tokenizer, vocab_size)
    built = tokenizer in tokenizers.KINDS
    spec = f"{tokenizer}:{vocab_size}" if built else Path(tokenizer).read_text(encoding="utf-8")
    key = hashlib.sha256(
        json.dumps([VERSION, source.key(), spec, val_fraction, shuffle]).encode()
    ).hexdigest()
    folder = Path(cache) / key[:16]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not is_intact(folder):
            loaded = source.load()
            learned_from = loaded.pop("tokenizer", None)
            whole = bool(getattr(source, "whole_documents", False))
            splits = split(loaded, val_fraction, shuffle, whole=whole)
            size = sum(len(text) for documents in splits.values() for text in documents)
            if size > 1e6:
                say(f"data: tokenising {size:,} characters; later runs find them in {folder}")

            def write(into: Path) -> None:
                tokenise(splits, learned_from or splits["train"], tokenizer, vocab_size, into)
                if isinstance(source, KnownSource):
                    write_floor(source.floor(splits["val"]), into)

            publish(folder, write, 2 * size)
    return load(folder)


def split(
    splits: dict[str, list[str]], val_fraction: float, shuffle: bool, *, whole: bool = False
) -> dict[str, list[str]]:
    """Cut a validation split off the end of the training text, unless the source has its own.

    Between two documents, if they are to stay `whole`.
    """
    documents = list(splits["train"])
    if "val" in splits or val_fraction == 0:
        return {"train": documents, "val": splits.get("val", [])}
    if shuffle:
        random.Random(0).shuffle(documents)
    if whole:
        cut = min(round(len(documents) * (1 - val_fraction)), len(documents) - 1)
        return {"train": documents[:cut], "val": documents[cut:]}
    keep = round(sum(map(len, documents)) * (1 - val_fraction))
    train: list[str] = []
    val: list[str] = []
    for document in documents:
        train.append(document[:keep])
        val.append(document[keep:])
        keep = max(0, keep - len(document))
    return {"train": list(filter(None, train)), "val": list(filter(None, val))}


def tokenise(
    splits: dict[str, list[str]], learned_from: list[str], kind: str, vocab_size: int, into: Path
) -> None:
    """Write tokens.bin (training tokens, then validation), its tokenizer, documents and meta data.

    A tokenizer that learns its vocabulary does so from the documents `learned_from`.
    Documents of one split are joined by the tokenizer's end-of-text token, if it has one.
    """
    if not any(splits["train"]):
        raise ValueError("the corpus is empty")
    everything = [text for documents in splits.values() for text in documents]
    codec = tokenizers.build(kind, learned_from, everything, vocab_size)
    end = codec.token_to_id(tokenizers.END_OF_TEXT)
    dtype = np.uint16 if codec.get_vocab_size() <= 1 << 16 else np.uint32
    tables = {}
    with (into / "tokens.bin").open("wb") as file:
        for name, documents in splits.items():
            rows = np.zeros((len(documents), 3), np.int64)  # first token, tokens, bytes
            position, last = 0, -1
            for number, ids in encode_all(codec, documents):
                if number != last:
                    if number > 0 and end is not None:
                        file.write(np.array([end], dtype).tobytes())
                        position += 1
                    rows[number] = position, 0, len(documents[number].encode())
                    last = number
                file.write(np.array(ids, dtype).tobytes())
                position += len(ids)
                rows[number, 1] += len(ids)
            tables[name] = rows
    np.savez(into / "documents.npz", allow_pickle=False, **tables)
    (into / "tokenizer.json").write_text(codec.to_str(), encoding="utf-8")
    meta = {"dtype": np.dtype(dtype).name, "fingerprint": fingerprint(splits)}
    ends = {name: int(rows[-1, :2].sum()) if len(rows) else 0 for name, rows in tables.items()}
    (into / "meta.json").write_text(json.dumps(meta | ends))


def write_floor(floor: np.ndarray, into: Path) -> None:
    """Write floor.npy, that of each character, if each is one token of the validation split."""
    if len(floor) == json.loads((into / "meta.json").read_text())["val"]:
        np.save(into / "floor.npy", floor, allow_pickle=False)


def fingerprint(splits: dict[str, list[str]]) -> str:
    """SHA-256 of the documents of each split, whatever the tokenizer."""
    digest = hashlib.sha256()
    for name, documents in splits.items():
        for document in documents:
            text = document.encode()
            digest.update(f"{name}:{len(text)}:".encode() + text)
    return digest.hexdigest()


def encode_all(codec: Tokenizer, documents: list[str]) -> Iterator[tuple[int, list[int]]]:
    """Token ids of all documents in order, one piece at a time, with the number of its document.

    Raises ValueError if decoding them gives another text.
    """
    numbered = [(n, piece) for n, document in enumerate(documents) for piece in pieces(document)]
    console = Console(stderr=True)
    for batch in track(
        list(batched(numbered)),
        "tokenising",
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ):
        texts = [piece for _, piece in batch]
        try:
            encoded = codec.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"the tokenizer cannot encode this text: {error}") from error
        ids = [list(encoding.ids) for encoding in encoded]
        check_lossless(texts, codec.decode_batch(ids, skip_special_tokens=False))
        yield from zip((number for number, _ in batch), ids, strict=True)


def batched(numbered: list[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Batches of pieces, each about 16 full ones: enough for all cores, and bounded in memory."""
    batch: list[tuple[int, str]] = []
    held = 0
    for number, piece in numbered:
        batch.append((number, piece))
        held += len(piece)
        if held >= 16 * PIECE:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def pieces(document: str) -> Iterator[str]:
    """Cut a long document where no token is split."""
    start = 0
    while cut := SAFE_CUT.search(document, start + PIECE):
        yield document[start : cut.end()]
        start = cut.end()
    yield document[start:]


def check_lossless(texts: Iterable[str], decoded: Iterable[str]) -> None:
    """Raise ValueError for text that the tokenizer does not reproduce: its bits per byte would be wrong."""
    for text, back in zip(texts, decoded, strict=True):
        if text != back:
            pairs = enumerate(zip(text, back, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(text), len(back)))
            raise ValueError(
                f"the tokenizer is not lossless: {text[at : at + 12]!r} came back as "
                f"{back[at : at + 12]!r}"
            )


def is_intact(folder: Path) -> bool:
    try:
        verify(folder)
    except ValueError:
        return False
    return True


def load(folder: Path) -> Corpus:
    """Map a prepared corpus into memory. Raises ValueError for files that are not one."""
    try:
        return mapped(folder)
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, BadZipFile) as error:
        why = " ".join(str(error).split())
        raise ValueError(f"{folder} holds no prepared corpus; delete it ({why})") from error


def mapped(folder: Path) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    # torch indexes uint16 and int32; ids stay below 2^31, so int32 reads a uint32 file as it is.
    dtype = torch.uint16 if meta["dtype"] == "uint16" else torch.int32
    size = meta["train"] + meta["val"]
    tokens = torch.from_file(str(folder / "tokens.bin"), shared=False, size=size, dtype=dtype)
    tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
    with np.load(folder / "documents.npz", allow_pickle=False) as tables:
        documents = dict(tables)
    floor = folder / "floor.npy"
    return Corpus(
        train=tokens[: meta["train"]],
        val=tokens[meta["train"] :] if meta["val"] else None,
        tokenizer=tokenizers.from_text(tokenizer_json),
        tokenizer_json=tokenizer_json,
        fingerprint=meta["fingerprint"],
        documents=documents,
        floor=np.load(floor, allow_pickle=False) if floor.exists() else None,
    )
