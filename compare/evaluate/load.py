"""Finished runs, selected on the command line and loaded: what eval.py and sample.py share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tokenizers import Tokenizer
from torch import Tensor

from compare.report.runs import read
from data.atomic import read_json, write_json
from data.tokenizer import sha256_of
from model.loss import token_nll
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
class LoadedRun:
    """A run with its model, ready to evaluate."""

    folder: Path
    config: Config
    tokenizer: Tokenizer
    checkpoint: Checkpoint | None  # None: the model as initialised
    model: Transformer
    device: Device

    @property
    def tokenizer_sha256(self) -> str:
        """The SHA-256 of tokenizer.json."""
        return tokenizer_sha256(self.folder)

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of the training text and its split."""
        return str(self.checkpoint.state["data_fingerprint"]) if self.checkpoint else None

    @property
    def step(self) -> int:
        """Optimizer steps at the checkpoint."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def pos_label(self) -> str:
        """The position scheme and its keys, for a file name: 'rope_yarn-factor-4'."""
        options = sum(pos_options(self.config).items(), ())
        return "-".join(map(str, (self.config["choices"]["pos"], *options)))

    @property
    def described(self) -> Config:
        """The model that an answer is about, for JSON."""
        return {
            "run": str(self.folder),
            "step": self.step,
            "dtype": self.device.dtype_name,
            "pos": self.config["choices"]["pos"],
            "pos_options": pos_options(self.config),
        }

    def reaches(self, context: int) -> bool:
        """True if the positions are defined for a context, in tokens."""
        end = self.model.position.max_len
        return end is None or context <= end

    def context(self, given: int | None) -> int:
        """The context that is given, or that of training, in tokens.

        Raises ValueError beyond the limit of the position scheme.
        """
        context = given or self.model.shape.max_len
        if not self.reaches(context):
            raise ValueError(
                f"context={context} exceeds the limit of pos={self.config['choices']['pos']}: "
                f"{self.model.position.max_len} tokens ({self.folder})"
            )
        return context

    def batch_size(self, given: int | None) -> int:
        """The batch size that is given, or that of evaluation in training."""
        return given or int(self.config["eval_batch_size"])

    def stride(self, asked: int) -> int:
        """Tokens from one window to the next: as asked, but no more than the model predicts of a window."""
        return min(asked, self.model.shape.latents or asked)

    def score(self, tokens: Tensor, **options: Any) -> Tensor:
        """Nats of each token (N,) but the first, (N - 1,); options of `token_nll`."""
        with self.device.autocast():
            options["predicted"] = self.model.shape.latents
            return token_nll(self.model, tokens, device=self.device.name, **options)

    def write_answer(self, name: str, answer: Config, text: str) -> int:
        """Write an answer to eval/NAME.json in the run folder and print its text; exit code 0."""
        path = self.folder / "eval" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, answer)
        print(f"{text}\n\nwritten: {path}")
        return 0


@dataclass(frozen=True, kw_only=True)
class RunSelector:
    """The keys that name runs and say how to load them. Raises ValueError for invalid values."""

    run: str
    checkpoint: str
    device: str
    dtype: str | None
    threads: int | None
    #: Another position scheme than the runs' own: its config, its name, and the keys that were set.
    pos: Config | None = None
    pos_name: str | None = None
    pos_keys: frozenset[str] = field(default_factory=frozenset)
    #: Another text than the runs' own: its config and its name.
    data: Config | None = None
    data_name: str | None = None

    def __post_init__(self) -> None:
        at_least(1, self, "threads")

    def refuse_data(self, kind: str) -> None:
        """Raise ValueError if another text is named: this kind of evaluation has its own."""
        if self.data is not None:
            raise ValueError(f"eval={kind} has texts of its own; data=... is for other kinds")

    @property
    def folders(self) -> list[Path]:
        """The folders in `run`, separated by commas: of runs, or of whole sweeps."""
        names = [name.strip() for name in self.run.split(",")]
        if not all(names):
            raise ValueError(f"run={self.run}: empty name between commas")
        return [Path(name) for name in names]

    @property
    def runs(self) -> list[Path]:
        """The finished runs in these folders. Raises ValueError if one holds none."""
        for folder in self.folders:
            if not any(run.done for run in read([folder])):
                raise ValueError(f"{folder} holds no finished run")
        return [run.folder for run in read(self.folders) if run.done]

    @property
    def only(self) -> Path:
        """The single folder in `run`. Raises ValueError for several."""
        if len(self.folders) > 1:
            raise ValueError(f"run={self.run}: expected one run, got {len(self.folders)}")
        return self.folders[0]

    def load(self, folder: Path, *, allow_untrained: bool = False) -> LoadedRun:
        """Load a run at the selected checkpoint.

        With `allow_untrained`, a run without checkpoints gives the model as initialised. Raises
        ValueError, naming the file, for whatever is no run or does not belong together.
        """
        config = open_config(folder)
        if self.pos is not None:
            own = pos_options(config).items()
            kept = {k: v for k, v in own if k in self.pos and k not in self.pos_keys}
            config["pos"] = self.pos | kept
            config["choices"] = config["choices"] | {"pos": self.pos_name}
        environment = read_json(folder / "environment.json")
        device = devices.select_device(self.device, self.dtype or str(environment.get("dtype")))
        devices.set_up_process(self.threads, config["tf32"])
        tokenizer = open_tokenizer(folder)
        checkpoint = None
        if allow_untrained and not any(folder.glob("checkpoints/step_*")):
            model = open_model(folder, config, tokenizer)
            init_model(model, config, config["seed"])
        else:
            checkpoint = open_checkpoint(folder, self.checkpoint)
            if tokenizer_sha256(folder) != checkpoint.state.get("tokenizer_sha256"):
                raise ValueError(f"{folder / 'tokenizer.json'} is not the tokenizer of training")
            weights = checkpoint.model()
            with torch.device("meta"):  # a config may ask for more than memory holds
                check_fit(open_model(folder, config, tokenizer), weights, str(checkpoint.folder))
            model = open_model(folder, config, tokenizer)
            load(model, weights, str(checkpoint.folder))
        return LoadedRun(
            folder, config, tokenizer, checkpoint, model.to(device.name).eval(), device
        )


def tokenizer_sha256(folder: Path) -> str:
    """The SHA-256 of a run's tokenizer.json."""
    return sha256_of((folder / "tokenizer.json").read_text(encoding="utf-8"))


def pos_options(config: Config) -> Config:
    """The keys of a config's position scheme."""
    return {key: value for key, value in config["pos"].items() if key != "_target_"}


def parse_options(
    overrides: list[str], composed: Config, options: type[T]
) -> tuple[RunSelector, T]:
    """The run selector in a composed config, and its other keys as an `options` object."""
    choices, pos, data = (composed.pop(key, None) for key in ("choices", "pos", "data"))
    given = {"pos", "pos_name", "pos_keys", "data", "data_name"}
    keys, rest = arguments("", composed, RunSelector, options, given=given)
    selector = RunSelector(
        **keys,
        pos=pos,
        pos_name=choices.get("pos"),
        pos_keys=frozenset(key.removeprefix("pos.") for key in keys_set(overrides)),
        data=data,
        data_name=choices.get("data"),
    )
    return selector, options(**rest)


@contextmanager
def environment_variables(**values: str) -> Iterator[None]:
    """Set environment variables, and restore all of them afterwards."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
