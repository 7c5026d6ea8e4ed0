"""Sources of text: the standard library, local files, or any dataset of the Hugging Face hub.

A source offers `key()`, a string that changes whenever its text does, and `load()`, the documents
of each split: {"train": [...]}, and "val" if the source has its own; and "tokenizer" if a tokenizer
is to learn its vocabulary from other documents than those of training.
"""

import codecs
import functools
import glob
import hashlib
import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from data.atomic import sha256

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
BINARY = {".parquet"}
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Stdlib:
    """The Python standard library's own source: about 10 MB of real text on every machine.

    Files in order of their paths, one document each. Left out: tests, installed packages, and
    `encodings` and `pydoc_data`, which are tables rather than prose or code.
    """

    leave_out = frozenset(
        "test tests idle_test site-packages dist-packages __pycache__ encodings pydoc_data".split()
    )

    def __init__(self) -> None:
        self.root = Path(sysconfig.get_paths()["stdlib"])
        self.paths = sorted(self.files(), key=lambda p: p.relative_to(self.root).as_posix())
        if not self.paths:
            raise ValueError(f"no Python sources in {self.root}; try data=text data.path=FILE")

    def files(self) -> Iterator[Path]:
        """The files, in any order."""
        for folder, subfolders, names in os.walk(self.root):
            subfolders[:] = [name for name in subfolders if name not in self.leave_out]
            yield from (Path(folder, name) for name in names if name.endswith(".py"))

    def key(self) -> str:
        return f"stdlib:{hash_files(self.paths)}"

    def load(self) -> dict[str, list[str]]:
        return {"train": read_texts([path for path in self.paths if is_text(path)])}


class Text:
    """Local files: a path or glob of .jsonl, .csv, .parquet (their `column`), anything else as text.

    Line ends become \\n and a byte order mark is dropped. Raises ValueError, naming the file, if
    nothing matches, or a file is empty, binary or not UTF-8.
    """

    def __init__(self, *, path: str, column: str) -> None:
        given = Path(path).expanduser()
        found = [str(given)] if given.is_file() else sorted(glob.glob(str(given), recursive=True))
        matches = [Path(p) for p in found]
        self.column = column
        self.paths = [p for p in matches if p.is_file()]
        if not self.paths:
            what = (
                "is a folder; name its files, as in 'folder/*.txt'" if matches else "no such file"
            )
            raise ValueError(f"data.path={path}: {what}")
        for file in self.paths:
            if file.suffix not in BINARY:
                check_text(file)

    def key(self) -> str:
        kinds = [LOADERS.get(path.suffix, "") for path in self.paths]  # as `load` reads them
        read_as = f":{','.join(kinds)}" if any(kinds) else ""
        return f"text:{self.column}:{hash_files(self.paths)}{read_as}"

    def load(self) -> dict[str, list[str]]:
        documents: list[str] = []
        for path in self.paths:
            if loader := LOADERS.get(path.suffix):
                rows = open_dataset(loader, data_files=glob.escape(str(path)), split="train")
                documents += rows_to_texts(rows, self.column, str(path))
            else:
                documents += read_texts([path])
        return {"train": documents}


class Lines:
    """A local text file whose lines are documents, as of short biographies; empty lines are left out.

    Raises ValueError, naming the file, if it is missing, empty, binary or not UTF-8.
    """

    def __init__(self, *, path: str) -> None:
        self.path = one_file("data.path", path)

    def key(self) -> str:
        return f"lines:{hash_files([self.path])}"

    def load(self) -> dict[str, list[str]]:
        return {"train": read_lines(self.path)}


class Pairs:
    """Questions and answers, a pair a line with a tab between; `dev` is the validation split.

    A third column, if there is one, is a group that accuracy is reported for. Raises ValueError,
    naming the file and the line, for a line of another form.
    """

    whole_documents = True  # a split does not cut them

    def __init__(self, *, train: str, dev: str | None) -> None:
        self.paths = {"train": one_file("data.train", train)}
        if dev is not None:
            self.paths["val"] = one_file("data.dev", dev)
        for path in self.paths.values():
            for number, line in enumerate(read_lines(path), 1):
                cells = line.split("\t")
                if not 2 <= len(cells) <= 3 or not all(cells[:2]):
                    raise ValueError(
                        f"{path}, line {number}: {line[:40]!r} is not QUESTION<tab>ANSWER"
                    )

    def key(self) -> str:
        return f"pairs:2:{hash_files(self.paths.values())}"

    def load(self) -> dict[str, list[str]]:
        return {split: read_lines(path) for split, path in self.paths.items()}


class Hub:
    """A dataset of the Hugging Face hub, or a local folder laid out like one, streamed.

    `name` picks a configuration, `revision` a version, `column` the text. Rows are documents, or
    with `join` are joined by it into one. `val_split=null` leaves the validation split to us.
    Loading stops after `max_bytes` of each split; null reads everything.
    Raises ValueError, in one line, for whatever the hub or the data refuse.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None,
        revision: str | None,
        split: str,
        val_split: str | None,
        column: str,
        join: str | None,
        max_bytes: int | None,
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes} must be at least 1, or null for no limit")
        self.path, self.name, self.revision = path, name, revision
        self.splits = {"train": split} | ({"val": val_split} if val_split else {})
        self.column, self.join, self.max_bytes = column, join, max_bytes

    def key(self) -> str:
        options = (self.path, self.name, self.revision, self.splits, self.column, self.join)
        folder = Path(self.path)
        files = sorted(folder.rglob("*")) if folder.is_dir() else []
        names = [path.relative_to(folder).as_posix() for path in files]  # which may name the split
        content = f"{hash_files(files)}:{names}" if files else "hub"
        return f"hub:{options}:{self.max_bytes}:{content}"

    def load(self) -> dict[str, list[str]]:
        return {ours: self.load_split(theirs) for ours, theirs in self.splits.items()}

    def load_split(self, split: str) -> list[str]:
        rows = open_dataset(self.path, name=self.name, revision=self.revision, split=split)
        texts = rows_to_texts(rows, self.column, f"{self.path} ({split})", self.max_bytes)
        return texts if self.join is None else [self.join.join(texts)]


def open_dataset(path: str, **options: object) -> Iterable[dict[str, object]]:
    """Stream a dataset's rows with the `datasets` library; its many errors become one ValueError."""
    import datasets  # a second to import, and a cached corpus never needs it

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub"):  # what they log, the ValueError says
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield from datasets.load_dataset(path, streaming=True, **options)
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"cannot read {options.get('data_files', path)}: {reason}") from error


def rows_to_texts(
    rows: Iterable[dict[str, object]], column: str, where: str, max_bytes: int | None = None
) -> list[str]:
    """The text column of rows, up to `max_bytes`. Raises ValueError if one is not text."""
    texts, size = [], 0
    for number, row in enumerate(rows, 1):
        text = row.get(column)
        if not isinstance(text, str):
            found = f"its columns are {', '.join(row)}" if column not in row else f"found {text!r}"
            raise ValueError(f"{where}, row {number}: column={column} holds no text; {found}")
        texts.append(text)
        size += len(text.encode())
        if max_bytes is not None and size >= max_bytes:
            break
    return texts


def read_texts(paths: list[Path]) -> list[str]:
    """Whole files as documents, through the `datasets` text loader; empty files are left out."""
    rows = open_dataset(
        "text",
        data_files=[glob.escape(str(path)) for path in paths],
        split="train",
        sample_by="document",
        encoding="utf-8-sig",
    )
    return [text for text in rows_to_texts(rows, "text", "text") if text]


def one_file(key: str, name: str) -> Path:
    """The file that a key names. Raises ValueError unless it is non-empty UTF-8 text."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise ValueError(f"{key}={name}: no such file")
    check_text(path, key)
    return path


def read_lines(path: Path) -> list[str]:
    """The lines of a file that are not empty."""
    return [line for text in read_texts([path]) for line in text.split("\n") if line.strip()]


def check_text(path: Path, key: str = "data.path") -> None:
    """Raise ValueError unless a file, which a key names, is non-empty UTF-8 text."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with path.open("rb") as file:
        for chunk in chunks(file):
            if offset == 0 and chunk.startswith(UTF16):
                raise ValueError(f"{key}: {path} is UTF-16; save it as UTF-8")
            kept = len(decoder.getstate()[0])  # bytes of a character that has only begun
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{key}: {path} is not UTF-8 text (byte {offset - kept + error.start}); "
                    "if it is text, save it as UTF-8"
                ) from error
            if b"\0" in chunk:
                where = offset + chunk.index(b"\0")
                raise ValueError(f"{key}: {path} is binary, not text (a NUL at byte {where})")
            offset += len(chunk)
    if offset == 0:
        raise ValueError(f"{key}: {path} is empty")


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """A file in chunks, the last one empty."""
    while chunk := file.read(1 << 20):
        yield chunk
    yield b""


def is_text(path: Path) -> bool:
    """True for a file of non-empty UTF-8 text."""
    try:
        check_text(path)
    except ValueError:
        return False
    return True


def hash_files(paths: Iterable[Path]) -> str:
    """One SHA-256 over the contents of files, in this order."""
    found = ((p, p.stat()) for p in paths if p.is_file())
    digests = (digest(p, (stat.st_mtime_ns, stat.st_size)) for p, stat in found)
    return hashlib.sha256("".join(digests).encode()).hexdigest()


@functools.cache
def digest(path: Path, _: tuple[int, int]) -> str:
    """The SHA-256 of a file with this stamp: read once, as a run asks for it several times."""
    return sha256(path)
