"""The scalars of train.yaml and its small groups, each checked by its own class."""

import re
from dataclasses import dataclass, fields

from model.attention import KERNELS
from train.config.compose import choices_of
from train.config.keys import KEYS
from train.config.schema import Config, arguments, at_least, choose

HOW = ("mean", "first", "random")  # of KV heads, see train/setup/convert.py


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The scalars of train.yaml. Raises ValueError for what cannot be trained."""

    out: str | None
    name: str | None
    seed: int
    steps: int
    minutes: float | None
    batch_size: int
    accumulate: int
    gpus: int
    shard: str
    eval_every: int | None
    eval_batch_size: int
    save_every: int | str | None
    keep: int
    log_every: int
    resume: bool
    init_from: str | None
    convert: str
    device: str
    dtype: str
    threads: int | None
    compile: bool | str
    tf32: bool
    deterministic: bool
    memory: str
    kernel: str
    force: bool

    def __post_init__(self) -> None:
        at_least(0, self, "steps", "seed")
        at_least(1, self, "batch_size", "accumulate", "gpus", "eval_every", "eval_batch_size")
        at_least(1, self, "keep", "log_every", "threads")
        if isinstance(self.save_every, str):
            choose("save_every", self.save_every, dict.fromkeys(["auto"]))
        else:
            at_least(1, self, "save_every")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes:g} must be above 0, or null for no limit")
        if self.accumulate > self.batch_size:
            raise ValueError(
                f"accumulate={self.accumulate} is more than batch_size={self.batch_size}"
            )
        if self.gpus > 1 and self.accumulate % self.gpus:
            raise ValueError(
                f"accumulate={self.accumulate}, the micro-batches of a step on all GPUs together, must "
                f"be a multiple of gpus={self.gpus}"
            )
        choose("shard", self.shard, dict.fromkeys(("none", "full")))
        if self.sharded and self.gpus == 1:
            raise ValueError(
                "shard=full spreads a model over the processes of a run, and gpus=1 is one; "
                "gpus=2 or more, or shard=none"
            )
        if self.sharded and self.compile is True:
            raise ValueError("compile=true does not work with shard=full; compile=false does")
        choose("convert", self.convert, dict.fromkeys(HOW))
        choose("memory", self.memory, dict.fromkeys(("full", "lean")))
        choose("kernel", self.kernel, dict.fromkeys(KERNELS))
        check_file_name("name", self.name)

    @property
    def sharded(self) -> bool:
        """True for a model that is spread over the processes of the run."""
        return self.shard == "full"

    @property
    def rows(self) -> int:
        """Rows of the largest micro-batch."""
        return -(-self.batch_size // self.accumulate)


#: Keys of a config that are no scalars of one run.
APART = KEYS.keys() - {field.name for field in fields(Settings)}


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the final model's sample is drawn: the keys under sample."""

    prompt: str | None
    tokens: int
    temperature: float
    top_k: int | None

    def __post_init__(self) -> None:
        at_least(0, self, "tokens", "temperature", where="sample.")
        at_least(1, self, "top_k", where="sample.")
        if self.prompt == "":
            raise ValueError("sample.prompt is empty; null takes one from the text")


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """Evaluations, title, leading figure, additional tables, notes and claim: the keys under report."""

    title: str | None
    figure: str | None
    figure_file: str | None
    tables: list[str]
    notes: list[str]
    evaluate: list[str]
    claim: Config | None

    def __post_init__(self) -> None:
        if self.figure is not None:
            choose("report.figure", self.figure, dict.fromkeys(FIGURES))
        for table in self.tables:
            choose("report.tables", table, dict.fromkeys(TABLES))
        check_file_name("report.figure_file", self.figure_file)
        claim_of(self)


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim and how a sweep asks it again: the keys under report.claim.

    Written before the first run, so that nothing seen chooses what is expected.
    """

    says: str  # a sentence
    published: str  # what was measured, on which models
    number: str  # in a few words, by the ruler if possible
    source: str  # who, when
    link: str
    variant: str  # as a baseline is named; it is held against the sweep's baseline
    ruler: str  # one of RULERS
    context: int | None  # tokens, of the ruler "perplexity at a context"
    scaled: list[str] | None  # there: RoPE scaled so for the variant, and so for the baseline
    levels: list[int] | None  # of difficulty, of the ruler "exact match"; null: all
    expected: str  # one of EXPECTED
    margin: float  # what does not matter, for "same" and "not higher": a share, of exact match and nats that much
    written: str  # the date

    def __post_init__(self) -> None:
        choose("report.claim.ruler", self.ruler, dict.fromkeys(RULERS))
        choose("report.claim.expected", self.expected, dict.fromkeys(EXPECTED))
        at_least(1, self, "context", where="report.claim.")
        if not 0 <= self.margin < 1:
            raise ValueError(f"report.claim.margin={self.margin:g} must be at least 0 and below 1")
        if (self.margin > 0) != (self.expected in ("same", "not higher")):
            raise ValueError(
                f"report.claim.margin={self.margin:g}: above 0 for expected=same and 'not higher', else 0; "
                f"expected={self.expected}"
            )
        if not self.variant.strip():
            raise ValueError("report.claim.variant is empty: name a variant, as attn=gqa")
        if self.scaled is not None and (self.context is None or len(self.scaled) != 2):
            raise ValueError(
                f"report.claim.scaled={self.scaled}: two ways to scale positions, that of the variant and "
                "that of the baseline, for ruler='perplexity at a context'"
            )
        for name in self.scaled or ():
            choose("report.claim.scaled", name, dict.fromkeys(choices_of("pos")))
        if self.levels is not None and self.ruler != "exact match":
            raise ValueError(f"report.claim.levels={self.levels} is of ruler='exact match'")
        if (self.ruler == "perplexity at a context") != (self.context is not None):
            raise ValueError(
                f"report.claim.context={self.context} is of ruler='perplexity at a context', and "
                "needed there"
            )


def claim_of(report: Reporting) -> Claim | None:
    """The claim of a sweep, if it has one; a key of some claims alone may be missing from others.

    Raises ValueError for what is no claim.
    """
    if report.claim is None:
        return None
    unset = {"context": None, "scaled": None, "levels": None, "margin": 0.0}
    return Claim(**arguments("report.claim", unset | report.claim, Claim)[0])


RULERS = ("perplexity", "perplexity at a context", "exact match", "compute", "rate sensitivity")
EXPECTED = ("lower", "higher", "same", "not higher")
FIGURES = (
    "training validation quality differences grid heads rates numbers worth ladder decoding length decode "
    "attention attention_distance attention_maps answers "
    "answers_differences finetuning"
).split()
TABLES = ["decoding"]


def check_file_name(key: str, name: str | None) -> None:
    """Raise ValueError for a name with a path in it, or other characters than these."""
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"{key}={name!r} may hold letters, digits, '-', '_' and '.' alone")


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """How Weights & Biases mirrors the run: the keys under wandb."""

    mode: str
    project: str
    group: str | None
    tags: list[str]

    def __post_init__(self) -> None:
        choose("wandb.mode", self.mode, dict.fromkeys(("offline", "online", "disabled")))


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """The keys of train.yaml that a sweep as a whole follows."""

    jobs: int | str
    retry: bool
    seeds: str | None
    margin: float

    def __post_init__(self) -> None:
        if self.seeds is not None:
            choose("seeds", self.seeds, dict.fromkeys(["auto"]))
        if not 0 < self.margin < 1:
            raise ValueError(f"margin={self.margin:g} must be above 0 and below 1: 0.01 is 1 %")
        if self.jobs != "auto" and (isinstance(self.jobs, str) or self.jobs < 1):
            raise ValueError(f"jobs={self.jobs} must be at least 1, or auto: one for each GPU")
