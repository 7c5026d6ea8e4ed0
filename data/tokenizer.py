"""Tokenizers: characters, bytes, byte-level BPE, or any existing tokenizer.json. One format for all."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
KINDS = ("char", "byte", "bpe")
LONG_WORD = re.compile(r"(\S{1000})")
MARK_BYTE = 255  # no UTF-8 text has it, nor those of SPAN_MARKS
SPAN_MARKS = range(245, 255)  # byte tokens that stand for hidden spans of a text


def build(kind: str, train: Iterable[str], everything: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of this kind: `char`, `byte`, `bpe`, or the path of a tokenizer.json.

    BPE learns its `vocab_size` from the training documents alone; a character vocabulary is that of
    the whole corpus, without special tokens. Raises ValueError for a kind that does not exist.
    """
    check(kind, vocab_size)
    if kind == "char":
        return characters(everything)
    if kind == "byte":
        return raw_bytes()
    if kind == "bpe":
        return bpe(train, vocab_size)
    return from_file(Path(kind))


def check(kind: str, vocab_size: int) -> None:
    """Raise ValueError for a kind or size that `build` could not build, before any text is read."""
    if kind not in KINDS:
        from_file(Path(kind))
    if kind == "bpe" and vocab_size < 257:
        raise ValueError(
            f"data.vocab_size={vocab_size} is too small for bpe: 256 bytes and end-of-text need 257"
        )


def characters(documents: Iterable[str]) -> Tokenizer:
    """One token per character; ids in code point order."""
    vocabulary = sorted(set().union(*map(set, documents)))
    ids = {character: i for i, character in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unknown character>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def raw_bytes() -> Tokenizer:
    """One token per UTF-8 byte; the id is the byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    # The byte-level alphabet writes printable bytes as themselves, the others from code point 256 on.
    ids = {chr(byte): byte for byte in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def mark_of(tokenizer: Tokenizer) -> int | None:
    """A token that no text has, to stand between the parts of a row; None if there is none.

    A byte, or the end-of-text token.
    """
    return MARK_BYTE if is_bytes(tokenizer) else tokenizer.token_to_id(END_OF_TEXT)


def is_bytes(tokenizer: Tokenizer) -> bool:
    """True for the tokenizer whose ids are bytes."""
    return str(tokenizer.to_str()) == str(raw_bytes().to_str())


def bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with an end-of-text token. Little text yields a smaller vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(with_short_words(documents), trainer)
    return from_text(tokenizer.to_str())


def with_short_words(documents: Iterable[str]) -> Iterator[str]:
    """Documents with very long words cut: BPE training is quadratic in the length of a word."""
    for document in documents:
        yield from filter(None, LONG_WORD.split(document))


def from_file(path: Path) -> Tokenizer:
    """Load a tokenizer.json. Raises ValueError if there is none, or it is something else."""
    if path.suffix != ".json":
        raise ValueError(f"tokenizer={path} is not char, byte, bpe or the path of a tokenizer.json")
    try:
        return from_text(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer={path}: {error}") from error


def from_text(text: str) -> Tokenizer:
    """A tokenizer from the text of its tokenizer.json; text that spells a special token stays text.

    Raises ValueError for another text, and for ids beyond the size of the vocabulary.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exceptions
        raise ValueError(f"this is not a tokenizer.json: {error}") from error
    size, last = tokenizer.get_vocab_size(), max(tokenizer.get_vocab().values(), default=-1)
    if last >= size:
        raise ValueError(
            f"the tokenizer has an id of {last}, but {size} tokens: ids must have no gaps"
        )
    tokenizer.encode_special_tokens = True  # not saved in the file, so set at every load
    return tokenizer


def sha256_of(text: str) -> str:
    """SHA-256 of the tokenizer.json: the identity of a tokenizer."""
    return hashlib.sha256(text.encode()).hexdigest()


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a prompt. Raises ValueError, naming them, for characters outside the vocabulary."""
    try:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exceptions
        unknown = "".join(sorted({c for c in text if tokenizer.token_to_id(c) is None}))
        raise ValueError(f"prompt: characters outside the vocabulary: {unknown!r}") from error
    return list(ids)


def decode(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False))


def bytes_of(tokenizer: Tokenizer, token: int) -> int:
    """Number of UTF-8 bytes of a token, which may be part of a character."""
    text, name = decode(tokenizer, [token]), str(tokenizer.id_to_token(token))
    partial = "\ufffd" in text and "\ufffd" not in name
    return len(name) if partial else len(text.encode())  # byte-level names have one letter per byte
