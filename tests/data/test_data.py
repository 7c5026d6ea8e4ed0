"""From text to tokens: sources, tokenizers, the corpus and its cache."""

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
from tiny import Documents, corpus
from tokenizers import Tokenizer, models

from data import tokenizer as tokenizers
from data.atomic import publish, verify
from data.corpus import PIECE, encode_all, pieces, split
from data.source import Hub, Pairs, Stdlib, Text

STRANGE = "tab\t, NUL-free, emoji 👩‍🚀, accents é e\u0301, 漢字, עברית, <|endoftext|>, \n\n  end"


def written(tmp_path: Path, name: str, content: str | bytes) -> str:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


# Tokenizers


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_tokenizer_gives_back_any_text_it_was_built_on(kind: str) -> None:
    codec = tokenizers.build(kind, [STRANGE], [STRANGE], 300)
    again = tokenizers.from_text(codec.to_str())
    for tokenizer in (codec, again):
        assert tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, STRANGE)) == STRANGE


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_byte_level_tokenizers_give_back_text_they_never_saw(kind: str) -> None:
    codec = tokenizers.build(kind, ["only ascii here"], ["only ascii here"], 300)
    assert tokenizers.decode(codec, tokenizers.encode(codec, STRANGE)) == STRANGE


def test_a_byte_is_its_own_id() -> None:
    assert tokenizers.encode(tokenizers.raw_bytes(), "aé\n") == list("aé\n".encode())


def test_characters_are_those_of_the_corpus_without_special_tokens() -> None:
    codec = tokenizers.characters(["cab", "abc\n"])
    assert codec.get_vocab_size() == 4
    assert tokenizers.encode(codec, "\nabc") == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="outside the vocabulary: 'xé'"):
        tokenizers.encode(codec, "axé")


def test_text_that_spells_the_end_of_text_stays_text() -> None:
    codec = tokenizers.bpe(["some text"], 300)
    ids = tokenizers.encode(codec, tokenizers.END_OF_TEXT)
    assert codec.token_to_id(tokenizers.END_OF_TEXT) not in ids


def test_bpe_cuts_words_of_any_length_and_no_others() -> None:
    long = "ACGT" * 25_000  # one word, of which training alone would take minutes
    assert tokenizers.encode(tokenizers.bpe([long], 300), long)[0] != ord("A")
    short = [STRANGE, "word " * 500, "x" * 999]
    assert list(tokenizers.with_short_words(short)) == short
    cut = list(tokenizers.with_short_words(["a b" + "c" * 2500]))
    assert cut == ["a ", "b" + "c" * 999, "c" * 1000, "c" * 501]


def test_bpe_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    train, val = "abab cdcd " * 50, "zqzq " * 50
    made = corpus(Documents(train, val=[val]), tmp_path, tokenizer="bpe")
    vocabulary = set(made.tokenizer.get_vocab())
    assert "ab" in vocabulary
    assert "zq" not in vocabulary


def test_kinds_and_sizes_that_cannot_be_built_are_refused(tmp_path: Path) -> None:
    other = written(tmp_path, "other.json", '{"no": "tokenizer"}')
    gaps = str(tmp_path / "gaps.json")
    Tokenizer(models.WordLevel({"a": 0, "b": 1000}, "a")).save(gaps)
    for kind, size, message in (
        ("bep", 300, "is not char, byte, bpe"),
        ("bpe", 256, "need 257"),
        (other, 300, "not a tokenizer.json"),
        (gaps, 300, "has an id of 1000, but 2 tokens"),
        (str(tmp_path / "none.json"), 300, "No such file"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenizers.check(kind, size)


# Sources


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\r\ntwo\n"),
        ("a.md", "\ufeffone\ntwo\n"),
        ("a.jsonl", '{"text": "one\\ntwo\\n", "id": 1}\n'),
        ("a.csv", 'id,text\n1,"one\ntwo\n"\n'),
    ],
)
def test_every_format_gives_the_same_text(tmp_path: Path, name: str, content: str) -> None:
    source = Text(path=written(tmp_path, name, content), column="text")
    assert source.load() == {"train": ["one\ntwo\n"]}


def test_parquet_and_other_columns(tmp_path: Path) -> None:
    import datasets

    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"story": ["one", "two"]}).to_parquet(str(path))
    assert Text(path=str(path), column="story").load() == {"train": ["one", "two"]}
    with pytest.raises(
        ValueError, match=r"row 1: column=text holds no text; its columns are story"
    ):
        Text(path=str(path), column="text").load()


def test_a_glob_reads_its_files_in_order(tmp_path: Path) -> None:
    for name in "bca":
        written(tmp_path, f"{name}.txt", name)
    source = Text(path=f"{tmp_path}/*.txt", column="text")
    assert source.load() == {"train": ["a", "b", "c"]}
    key = source.key()
    written(tmp_path, "b.txt", "changed")
    assert source.key() != key


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\x7fELF\x02\x01\x01\x00\x00", r"binary, not text \(a NUL at byte 7\)"),
        (b"\xff\xfeh\x00i\x00", "is UTF-16"),
        (b"caf\xe9 au lait", r"not UTF-8 text \(byte 3\)"),
        ("café".encode()[:-1], r"not UTF-8 text \(byte 3\)"),
        (b"x" * ((1 << 20) - 1) + b"\xc3" + b"x", rf"not UTF-8 text \(byte {(1 << 20) - 1}\)"),
    ],
)
def test_files_that_are_no_text_are_named_and_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(ValueError, match=rf"bad.txt.*{message}"):
        Text(path=written(tmp_path, "bad.txt", content), column="text")


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        Text(path=f"{tmp_path}/none*.txt", column="text")
    with pytest.raises(ValueError, match="is a folder"):
        Text(path=str(tmp_path), column="text")


def test_rows_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, "a.jsonl", '{"text": "one"}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"row 2: column=text holds no text; found None"):
        Text(path=path, column="text").load()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A local folder laid out like a dataset repository of the hub, with two configurations."""
    card = """---
configs:
- config_name: small
  data_files:
  - {split: train, path: small/train.jsonl}
  - {split: validation, path: small/val.jsonl}
- config_name: other
  data_files: other.jsonl
---
"""
    (tmp_path / "small").mkdir()
    written(tmp_path, "README.md", card)
    written(tmp_path, "small/train.jsonl", "".join(f'{{"text": "row {i}\\n"}}\n' for i in range(9)))
    written(tmp_path, "small/val.jsonl", '{"text": "held out\\n"}\n')
    written(tmp_path, "other.jsonl", '{"text": "another"}\n')
    return tmp_path


def hub(path: Path, **options: object) -> Hub:
    defaults = {"name": "small", "revision": None, "split": "train", "val_split": "validation"}
    rest = {"column": "text", "join": None, "max_bytes": None}
    return Hub(path=str(path), **defaults | rest | options)


def test_a_hub_dataset_brings_its_own_splits(repository: Path) -> None:
    loaded = hub(repository).load()
    assert loaded["train"] == [f"row {i}\n" for i in range(9)]
    assert loaded["val"] == ["held out\n"]
    joined = hub(repository, join="", val_split=None, max_bytes=10).load()
    assert joined == {"train": ["row 0\nrow 1\n"]}
    assert hub(repository, name="other", val_split=None).load() == {"train": ["another"]}


def test_hub_errors_are_one_line(repository: Path) -> None:
    for options in ({"name": "none"}, {"split": "none"}, {"column": "none"}):
        with pytest.raises(ValueError, match="none") as error:
            hub(repository, **options).load()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="max_bytes=0"):
        hub(repository, max_bytes=0)


def test_the_standard_library_is_real_text_without_tests() -> None:
    source = Stdlib()
    names = {p.relative_to(source.root).as_posix() for p in source.paths}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not any({"test", "tests", "site-packages"} & set(Path(name).parts) for name in names)
    assert sum(p.stat().st_size for p in source.paths) > 3e6


# The corpus


def test_the_tokens_are_those_of_the_text(tmp_path: Path, text: Path) -> None:
    original = text.read_text()
    made = corpus(Text(path=str(text), column="text"), tmp_path)
    train = tokenizers.decode(made.tokenizer, made.train.tolist())
    val = tokenizers.decode(made.tokenizer, made.val.tolist())
    assert train + val == original
    assert len(val) == len(original) - round(0.9 * len(original))
    assert made.train.dtype == torch.uint16
    assert made.split("val")[1] == len(val.encode()) - len(val[0].encode())


def test_documents_are_joined_by_end_of_text_and_kept_apart_in_a_table(tmp_path: Path) -> None:
    made = corpus(Documents("aa", "bé", "c"), tmp_path, tokenizer="bpe", val_fraction=0)
    end = made.tokenizer.token_to_id(tokenizers.END_OF_TEXT)
    assert made.val is None
    assert (made.train == end).sum() == 2
    assert made.documents["train"][:, 2].tolist() == [2, 3, 1]
    for (start, length, _), document in zip(
        made.documents["train"], ("aa", "bé", "c"), strict=True
    ):
        ids = made.train[start : start + length].tolist()
        assert tokenizers.decode(made.tokenizer, ids) == document
    with pytest.raises(ValueError, match="no val split"):
        made.split("val")


def test_the_key_of_a_text_holds_how_it_is_read(tmp_path: Path) -> None:
    """The same bytes are two texts, by their suffix; in a folder like the hub's also by their name."""
    content = b'{"text": "one"}\n'
    keys = {Text(path=written(tmp_path, f"a{suffix}", content), column="text").key()
            for suffix in (".jsonl", ".csv", ".txt")}  # fmt: skip
    assert len(keys) == 3
    (tmp_path / "hub").mkdir()
    source = hub(tmp_path / "hub")
    (tmp_path / "hub/train.jsonl").write_bytes(content)
    before = source.key()
    (tmp_path / "hub/train.jsonl").rename(tmp_path / "hub/validation.jsonl")
    assert source.key() != before


def test_a_file_may_be_named_like_a_pattern(tmp_path: Path) -> None:
    for name, content in {"n[1].txt": "one", "n[1].jsonl": '{"text": "one"}\n'}.items():
        source = Text(path=written(tmp_path, name, content), column="text")
        assert source.load() == {"train": ["one"]}


def test_large_vocabularies_are_kept_in_32_bits(tmp_path: Path) -> None:
    everything = "".join(chr(i) for i in range(70_000) if not 0xD800 <= i < 0xE000) + "".join(
        chr(i) for i in range(0x10000, 0x10000 + 3000)
    )
    made = corpus(Documents(everything), tmp_path, val_fraction=0)
    assert made.tokenizer.get_vocab_size() > 1 << 16
    assert made.train.max() == made.tokenizer.get_vocab_size() - 1


def test_a_split_cuts_exactly_and_loses_nothing() -> None:
    documents = ["a" * 50, "b" * 30, "c" * 20]
    cut = split({"train": documents}, 0.25, shuffle=False)
    assert cut == {"train": ["a" * 50, "b" * 25], "val": ["b" * 5, "c" * 20]}
    shuffled = split({"train": documents}, 0.25, shuffle=True)
    assert shuffled == split({"train": documents}, 0.25, shuffle=True)
    assert sorted("".join(shuffled["train"] + shuffled["val"])) == sorted("".join(documents))
    whole = split({"train": documents}, 0.25, shuffle=False, whole=True)
    assert whole == {"train": documents[:2], "val": documents[2:]}
    own = split({"train": ["x"], "val": ["y"]}, 0.5, shuffle=True)
    assert own == {"train": ["x"], "val": ["y"]}


def test_pairs_are_not_cut_in_two(tmp_path: Path) -> None:
    lines = [f"Where was P{n} born?\tX{n}" for n in range(8)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines) + "\n")
    source = Pairs(train=str(tmp_path / "pairs.tsv"), dev=None)
    for share, first in ((0.3, 6), (0.01, 7)):
        made = corpus(source, tmp_path / "cache", tokenizer="byte", val_fraction=share)
        assert [len(made.documents[name]) for name in ("train", "val")] == [first, 8 - first]
        assert made.val is not None
        start = lines[first].partition("\t")[0]
        assert tokenizers.decode(made.tokenizer, made.val.tolist()).startswith(start)


def test_cutting_a_long_document_changes_no_token() -> None:
    lines = [f"    x_{i} = call({i})\n" if i % 3 else f"def f{i}():\n\n" for i in range(60_000)]
    long = "".join(lines)
    assert len(long) > 3 * PIECE
    codec = tokenizers.bpe([long[:100_000]], 400)
    assert len(list(pieces(long))) > 3
    assert "".join(pieces(long)) == long
    ids = [token for _, part in encode_all(codec, [long]) for token in part]
    assert ids == codec.encode(long).ids


def test_a_tokenizer_that_loses_text_is_refused(tmp_path: Path) -> None:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    lossy = Tokenizer(models.BPE(vocab=tokenizers.raw_bytes().get_vocab(), merges=[]))
    lossy.normalizer = normalizers.Lowercase()
    lossy.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lossy.decoder = decoders.ByteLevel()
    lossy.save(str(tmp_path / "lossy.json"))
    with pytest.raises(ValueError, match="not lossless: 'Text' came back as 'text'"):
        corpus(Documents("Some Text"[5:]), tmp_path, tokenizer=str(tmp_path / "lossy.json"))


def test_a_tokenizer_file_is_used_as_it_is(tmp_path: Path) -> None:
    codec = tokenizers.bpe(["hello hello hello"], 300)
    codec.save(str(tmp_path / "tokenizer.json"))
    made = corpus(Documents("hello there"), tmp_path, tokenizer=str(tmp_path / "tokenizer.json"))
    assert made.tokenizer.get_vocab() == codec.get_vocab()


def test_the_fingerprint_is_of_the_text_and_not_of_the_tokenizer(tmp_path: Path) -> None:
    a = corpus(Documents("some text, and more"), tmp_path)
    b = corpus(Documents("some text, and more"), tmp_path, tokenizer="byte")
    c = corpus(Documents("some text, and less"), tmp_path)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert a.identity["tokenizer_sha256"] != b.identity["tokenizer_sha256"]


def test_a_prepared_corpus_is_found_again_and_a_damaged_one_is_rebuilt(tmp_path: Path) -> None:
    class Once(Documents):
        loads = 0

        def load(self) -> dict[str, list[str]]:
            Once.loads += 1
            return super().load()

    source = Once("some text, and more")
    first = corpus(source, tmp_path).train.tolist()
    assert corpus(source, tmp_path).train.tolist() == first
    assert Once.loads == 1
    (file,) = tmp_path.glob("*/tokens.bin")
    content = bytearray(file.read_bytes())
    content[3] ^= 1
    file.write_bytes(bytes(content))
    assert corpus(source, tmp_path).train.tolist() == first
    assert Once.loads == 2


def prepare_once(cache: str) -> tuple[list[int], float]:
    made = corpus(Documents("some text, and more " * 1000), Path(cache), tokenizer="bpe")
    (file,) = Path(cache).glob("*/tokens.bin")
    return made.train[:50].tolist(), file.stat().st_mtime


def test_processes_that_start_at_once_build_one_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map(prepare_once, [str(tmp_path)] * 3)
    assert results[0] == results[1] == results[2]
    assert len(list(tmp_path.glob("*/tokens.bin"))) == 1


# Folders


def test_a_published_folder_is_complete_or_absent(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "a").write_text("content")

    def fail(folder: Path) -> None:
        (folder / "a").write_text("half")
        raise OSError("disk full")

    publish(tmp_path / "x", write, needs=7)
    verify(tmp_path / "x")
    with pytest.raises(
        OSError, match=r"could not write.*disk full; it needs about 7 bytes, [\d,]+ "
    ):
        publish(tmp_path / "x", fail, needs=7)
    verify(tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "all"])
def test_damage_to_a_published_folder_is_noticed(tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "x"
    publish(folder, lambda into: (into / "a").write_bytes(b"content" * 100), needs=700)
    file = folder / "a"
    if damage == "flip":
        file.write_bytes(b"d" + file.read_bytes()[1:])
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "remove":
        file.unlink()
    elif damage == "manifest":
        (folder / "MANIFEST.json").write_text("{")
    else:
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match="x"):
        verify(folder)
