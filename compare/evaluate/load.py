"""Finished runs, opened to be asked: what eval.py and sample.py have in common."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from tokenizers import Tokenizer

from compare.report.runs import read
from data.atomic import read_json, write_json
from data.tokenizer import sha256_of
from model.transformer import Transformer
from train.config.compose import keys_set
from train.config.schema import Config, arguments, at_least
from train.measure import device as devices
from train.measure.device import Device
from train.record.checkpoint import Checkpoint
from train.record.run_folder import open_checkpoint, open_config, open_tokenizer
from train.setup.build import init_model
from train.setup.weights import check_fit, load, open_model

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """A run with its model, ready to evaluate."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None  # None for the model as it started
    model: Transformer
    device: Device

    @property
    def label(self) -> str:
        """Its attention and positions."""
        return "{attn} {pos}".format(**self.config["choices"])

    @property
    def tokenizer_json(self) -> str:
        """Its tokenizer, as its file has it."""
        return tokenizer_file(self.folder)

    @property
    def trained_on(self) -> str | None:
        """What tells its text, with its split, from others."""
        return str(self.checkpoint.state["data_fingerprint"]) if self.checkpoint else None

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint else 0

    def check_context(self, context: int) -> None:
        """Raise ValueError for a context that the positions are not defined for."""
        end = self.model.position.max_len
        if end is not None and context > end:
            pos = self.config["choices"]["pos"]
            raise ValueError(
                f"context={context}: pos={pos} is not defined beyond {end} tokens ({self.folder})"
            )

    def answer(self, name: str, result: Config, told: str) -> int:
        """Leave a result as eval/NAME.json in the run, say it and where it lies; exit code 0."""
        path = self.folder / "eval" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, result)
        print(told)
        print(f"\nwritten: {path}")
        return 0


@dataclass(frozen=True, kw_only=True)
class Opening:
    """The keys that name runs, and how to open them. Raises ValueError for what cannot be asked."""

    run: str
    checkpoint: str
    device: str
    dtype: str | None
    threads: int | None
    #: A position scheme in place of the runs' own, its name, and the keys of it that were given.
    pos: Config | None = None
    pos_name: str | None = None
    given: frozenset[str] = field(default_factory=frozenset)
    #: Another text than the runs' own, and its name.
    data: Config | None = None
    data_name: str | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "threads")

    @property
    def folders(self) -> list[Path]:
        """The folders that are named, with commas between: of runs, or of whole sweeps."""
        names = [name.strip() for name in self.run.split(",")]
        if not all(names):
            raise ValueError(f"run={self.run}: no run is named")
        return [Path(name) for name in names]

    @property
    def runs(self) -> list[Path]:
        """The finished runs in these folders. Raises ValueError if one holds none."""
        for folder in self.folders:
            if not any(run.done for run in read([folder])):
                raise ValueError(f"{folder}: no run there has finished")
        return [run.folder for run in read(self.folders) if run.done]

    @property
    def only(self) -> Path:
        """The one run that is named. Raises ValueError for several, or a folder that is none."""
        if len(self.folders) > 1:
            raise ValueError(f"run={self.run}: one run at a time here, not {len(self.folders)}")
        return self.folders[0]

    def open(self, folder: Path, *, started: bool = False) -> Opened:
        """A run's model at the checkpoint asked for; with `started`, a run that has none as it began.

        Raises ValueError, naming the file, for whatever is no run or does not belong together.
        """
        config = open_config(folder)
        if self.pos is not None:
            kept = {k: v for k, v in own(config).items() if k in self.pos and k not in self.given}
            config["pos"] = self.pos | kept
            config["choices"] = config["choices"] | {"pos": self.pos_name}
        environment = read_json(folder / "environment.json")
        device = devices.pick(self.device, self.dtype or str(environment.get("dtype")))
        devices.set_up(self.threads, config["tf32"])
        tokenizer = open_tokenizer(folder)
        checkpoint = None
        if started and not any(folder.glob("checkpoints/step_*")):
            model = open_model(folder, config, tokenizer)
            init_model(model, config, config["seed"])
        else:
            checkpoint = open_checkpoint(folder, self.checkpoint)
            if sha256_of(tokenizer_file(folder)) != checkpoint.state.get("tokenizer_sha256"):
                raise ValueError(f"{folder / 'tokenizer.json'} is not what the run began with")
            weights = checkpoint.model()
            with torch.device("meta"):  # a config may ask for more than memory holds
                check_fit(open_model(folder, config, tokenizer), weights, str(checkpoint.folder))
            model = open_model(folder, config, tokenizer)
            load(model, weights, str(checkpoint.folder))
        return Opened(folder, config, tokenizer, checkpoint, model.to(device.name).eval(), device)


def tokenizer_file(folder: Path) -> str:
    """The tokenizer of a run, as its file has it."""
    return (folder / "tokenizer.json").read_text(encoding="utf-8")


def own(config: Config) -> Config:
    """The keys of a run's own positions."""
    return {key: value for key, value in config["pos"].items() if key != "_target_"}


def asked(overrides: list[str], composed: Config, taker: type[T]) -> tuple[Opening, T]:
    """How to open the runs that a composed config names, and its other keys as `taker` holds them."""
    choices, pos, data = (composed.pop(key, None) for key in ("choices", "pos", "data"))
    later = {"pos", "pos_name", "given", "data", "data_name"}
    keys, options = arguments("", composed, Opening, taker, given=later)
    opening = Opening(
        **keys,
        pos=pos,
        pos_name=choices.get("pos"),
        given=frozenset(key.removeprefix("pos.") for key in keys_set(overrides)),
        data=data,
        data_name=choices.get("data"),
    )
    return opening, taker(**options)
