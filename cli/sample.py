"""`python sample.py`: generate text from a finished run."""

from collections.abc import Iterable
from dataclasses import dataclass, fields

from tokenizers.decoders import DecodeStream

from cli.entry import compose_command
from compare.evaluate.load import LoadedRun, parse_options
from data.tokenizer import END_OF_TEXT, decode, encode
from model.generate import Sampler, generate
from train.config.old_spellings import current_overrides
from train.config.schema import at_least, choose
from train.record.terminal import printable, tracked

USAGE = """\
Generate text from a finished run. A single sample is printed as it is generated; several are printed
when all are complete.

  python sample.py run=DIR [KEY=VALUE ...]

Examples
  python sample.py run=outputs/runs/mine
  python sample.py run=outputs/runs/mine prompt="def main(" max_new_tokens=100
  python sample.py run=outputs/runs/mine temperature=0 repetition_penalty=1.2
  python sample.py run=outputs/runs/mine num_samples=3 temperature=1 top_k=null top_p=0.9 seed=7
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of sample.yaml. Raises ValueError for invalid values."""

    prompt: str | None
    max_new_tokens: int
    num_samples: int
    temperature: float
    top_k: int | None
    top_p: float | None
    repetition_penalty: float
    seed: int
    context: int | None
    context_overflow: str
    cache: bool

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens", "num_samples", "context")
        at_least(0, self, "seed")
        choose("context_overflow", self.context_overflow, dict.fromkeys(("slide", "refuse")))

    @property
    def sampler(self) -> Sampler:
        return Sampler(**{field.name: getattr(self, field.name) for field in fields(Sampler)})


def opening(run: LoadedRun) -> str:
    """A line break, to begin with. Raises ValueError if the vocabulary has none."""
    try:
        encode(run.tokenizer, "\n")
    except ValueError as error:
        raise ValueError(
            f"{run.folder} was trained on text without a line break: give prompt=..."
        ) from error
    return "\n"


def sample(overrides: list[str]) -> int:
    """`python sample.py`."""
    overrides = current_overrides("sample", overrides)
    composed = compose_command(overrides, "sample", USAGE)
    if composed is None:
        return 0
    selector, options = parse_options(overrides, composed, Options)
    sampler = options.sampler
    run = selector.load(selector.only)
    prompt = encode(run.tokenizer, opening(run) if options.prompt is None else options.prompt)
    context = run.context(options.context)
    if options.context_overflow == "refuse" and len(prompt) + options.max_new_tokens > context:
        raise ValueError(
            f"context_overflow=refuse: a prompt of {len(prompt)} tokens and max_new_tokens="
            f"{options.max_new_tokens} do not fit context={context}"
        )
    with run.device.autocast():
        rows = generate(
            run.model,
            prompt,
            options.max_new_tokens,
            sampler=sampler,
            seed=options.seed,
            num_samples=options.num_samples,
            context_length=context,
            use_cache=options.cache,
            eos_id=run.tokenizer.token_to_id(END_OF_TEXT),
        )
        if options.num_samples == 1:
            stream(run, prompt, (token for (token,) in rows if token is not None))
            return 0
        columns = list(tracked(rows, "generating", options.max_new_tokens))
    for number, tokens in enumerate(zip(*columns, strict=True)):
        if number:
            print("-" * 40)
        ids = [token for token in tokens if token is not None]
        print(printable(decode(run.tokenizer, [*prompt, *ids])))
    return 0


def stream(run: LoadedRun, prompt: list[int], tokens: Iterable[int]) -> None:
    """Print a text as it is generated: each character once its last token is known."""
    shown = decode(run.tokenizer, prompt)
    print(printable(shown), end="", flush=True)
    decoder, ids = DecodeStream(ids=prompt), list(prompt)
    for token in tokens:
        ids.append(token)
        if piece := decoder.step(run.tokenizer, token):
            shown += piece
            print(printable(piece), end="", flush=True)
    print(
        printable(decode(run.tokenizer, ids).removeprefix(shown))
    )  # bytes of an incomplete character
