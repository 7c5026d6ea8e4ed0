"""Random configs and files: each must work or end in one line."""

import random
import signal
import string
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kills import ROOT, Tally
from tiny import HANG

from data.corpus import prepare
from model.cost import count_parameters
from train.config.compose import choices_of, compose
from train.config.schema import Config
from train.setup.build import build_model, build_source
from train.setup.run_setup import assemble, check
from train.step import TrainStep

SMALL = 3 * 10**9  # multiplications of a step that is taken
GROUPS = ("model", "attn", "pos", "data", "objective", "tune", "optim")
SIZES = "1 2 3 4 6 8 12 24 100 0.1 0.5".split()
NUMBERS = (
    "0 1 -1 2 3 7 64 1e3 1e-3 1.5 -0.5 0.1 1e9 1e18 1e30 1e400 nan inf -inf 0x10 1_000".split()
)
OTHERS = (
    "null true false yes '' ' ' [] {} [1,2] [a] {a:1} [[1]] abc ../x /dev/null ${a} ${oc.env:HOME} "
    "${seed} ${model} ??? %00 é 漢 a,b glob(*) range(3) choice(a,b) 1e '\\0' '\\e[31m'"
).split(" ")


class Hung(Exception):
    """Something took longer than HANG."""


@contextmanager
def patience(seconds: float = HANG) -> Iterator[None]:
    """Context that raises Hung after this many seconds."""

    def give_up(*_: object) -> None:
        raise Hung(f"still running after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def keys_of(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a config, with their values."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from keys_of(value, f"{prefix}{key}.")
        yield prefix + key, value


def random_config(draw: random.Random, keys: dict[str, Any]) -> list[str]:
    """A few overrides: plausible ones, or any."""
    overrides = ["data=text", "data.path=README.md", "data.tokenizer=char"]
    wild = draw.random() < 0.5
    for group in GROUPS:
        if draw.random() < 0.3 and (wild or group != "data"):
            names = choices_of(group)
            overrides.append(
                f"{group}={draw.choice([*names, draw.choice(OTHERS)] if wild else names)}"
            )
    change = wild_change if wild else tame_change
    return overrides + [change(draw, keys) for _ in range(draw.randint(1, 3))]


def tame_change(draw: random.Random, keys: dict[str, Any]) -> str:
    """Another number or truth value for a key that has one."""
    key = draw.choice([key for key, value in keys.items() if isinstance(value, int | float)])
    if isinstance(keys[key], bool):
        return f"{key}={draw.choice(['true', 'false'])}"
    return f"{key}={draw.choice([*SIZES, draw.choice(NUMBERS)])}"


def wild_change(draw: random.Random, keys: dict[str, Any]) -> str:
    """Any value for any key, sometimes misspelt, added or deleted."""
    key = draw.choice(list(keys))
    value = random_text(draw) if draw.random() < 0.1 else draw.choice(NUMBERS + OTHERS)
    if draw.random() < 0.05:
        key = misspelt(draw, key)
    return draw.choice(["", "", "", "", "", "+", "++", "~"]) + f"{key}={value}"


def random_text(draw: random.Random) -> str:
    """Random characters, including control characters."""
    points = (
        draw.choice([draw.randrange(32, 127), draw.randrange(1, 0x3000)])
        for _ in range(draw.randint(1, 300))
    )
    return "".join(map(chr, points))


def misspelt(draw: random.Random, key: str) -> str:
    """A key with one character changed or added."""
    at = draw.randrange(len(key))
    return key[:at] + draw.choice(string.printable) + key[at + draw.randint(0, 1) :]


def configs(trials: int, seed: int) -> Tally:
    """Compose and check random configs, and take a step of small ones: each works or is refused in one line."""
    draw, tally = random.Random(seed), Tally()
    keys = dict(keys_of(compose(["data.path=README.md"])))
    for _ in range(trials):
        overrides = random_config(draw, keys)
        judge(tally, repr(overrides), lambda o=overrides: begin(tally, compose(o)))
    return tally


def commanded_configs(trials: int, seed: int, folder: Path) -> Tally:
    """Random configs to the real command with steps=0: exit code 0, or 2 and one line."""
    draw, tally = random.Random(seed), Tally()
    keys = dict(keys_of(compose(["data.path=README.md"])))
    while tally.trials < trials:
        overrides = [o for o in random_config(draw, keys) if "\0" not in o]
        place = [f"out={folder}/commanded-{tally.trials}", "steps=0"]
        tally.tried()
        try:
            done = subprocess.run(
                [sys.executable, "train.py", *overrides, *place],
                cwd=ROOT, capture_output=True, text=True, check=False, timeout=HANG,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            tally.faults.append(f"{overrides}: hangs")
            continue
        tally.note("valid" if done.returncode == 0 else "refused")
        said = done.stderr.splitlines()
        told = done.returncode == 2 and said and said[-1].startswith("error: ")
        if (done.returncode != 0 and not told) or "Traceback" in done.stderr:
            tally.faults.append(f"{overrides}: exit code {done.returncode}: {said[-1:]}")
    return tally


def begin(tally: Tally, config: Config) -> None:
    """Check a config; take a step if it is small."""
    spec = check(config)
    parameters, _ = count_parameters(build_model(spec.config, 100))
    work = parameters * spec.settings.batch_size * spec.max_len
    if work < SMALL and not spec.device.compiled:
        job = assemble(spec)
        if spec.settings.steps:
            TrainStep.of_job(job)(0)
            tally.note("trained")


def judge(tally: Tally, name: str, act: Callable[[], object]) -> None:
    """Do something that may be refused: an error that the command prints as one line is no fault."""
    tally.tried()
    try:
        with patience():
            act()
    except (ValueError, OSError) as error:
        tally.note("refused")
        if not str(error).split():  # what the door makes one line of
            tally.faults.append(f"{name}: nothing is said: {error!r}")
    except Exception as error:  # noqa: BLE001  whatever it is, it is what is looked for
        tally.faults.append(f"{name}: {type(error).__name__}: {error}")
    else:
        tally.note("valid")


KINDS = ".txt .md .jsonl .csv .json .parquet".split()


def random_file(draw: random.Random, folder: Path, text: str) -> Path:
    """A damaged text file under any of the known extensions."""
    words = text[: draw.choice([0, 1, 20, 2000])]
    spoiled: list[bytes] = [
        b"",
        b"\n\n\n",
        draw.randbytes(draw.choice([1, 100, 5000])),
        words.encode("utf-16"),
        (words + "\xe9\xff").encode("latin-1", "replace"),
        b"\xef\xbb\xbf" + words.encode(),
        words.encode() + b"\x00" + words.encode(),
        ("x" * 3_000_000).encode(),
        b'{"text": null}\n{"text": "a"}\n',
        b'{"text": 1}\n{"text": "a"}\n',
        b'{"text": "a"}\n["b"]\n',
        b'{"text": "whole"}\n{"text": "cut o',
        b'{"other": "a"}\n',
        b"[" * 100_000,
        b'text\n"open quote\nmore',
        b"PAR1" + draw.randbytes(200) + b"PAR1",
        words.encode(),
    ]
    path = folder / f"file{draw.randrange(10**9)}{draw.choice(KINDS)}"
    path.write_bytes(draw.choice(spoiled))
    return path


def files(trials: int, seed: int, folder: Path) -> Tally:
    """Prepare corpora of random bad files: each works or is refused in one line."""
    draw, tally = random.Random(seed), Tally()
    text = Path("README.md").read_text(encoding="utf-8")
    for _ in range(trials):
        path = random_file(draw, folder, text)
        kind = draw.choice(["char", "byte", "bpe"])
        config = compose(
            [f"data.path={path}", f"data.tokenizer={kind}", f"data.cache={folder}/cache"]
        )

        def act(config: Any = config) -> None:
            source, corpus = build_source(config["data"])
            prepare(source, say=lambda line: None, **corpus)

        judge(tally, f"{path.suffix} {path.read_bytes()[:20]!r}", act)
    return tally
