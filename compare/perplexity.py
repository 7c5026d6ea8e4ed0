"""What a checkpoint is worth: its perplexity on every token of a split."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compare.bigram import bigram_nats
from model.score import bits_per_byte, perplexity, score
from train import device as devices
from train.cli import compose_door
from train.config import Config, arguments, choose
from train.job import at_least
from train.progress import CONSOLE
from train.record import replace
from train.run import open_config, open_corpus, open_model, trained_dtype

USAGE = """\
Score a finished run on every token of its validation text: perplexity and bits per byte.
Prints them, and writes them as JSON under RUN/eval/.

  python eval.py run=DIR [KEY=VALUE ...]

Examples
  python eval.py run=outputs/runs/mine
  python eval.py run=outputs/runs/mine context=64
  python eval.py run=outputs/runs/mine checkpoint=best batch_size=1 dtype=float32
  python eval.py run=outputs/runs/mine split=train
  python eval.py run=outputs/runs/mine bigram=true
  python eval.py run=outputs/runs/mine context=512 pos=rope_yarn pos.factor=4
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The keys of eval.yaml. Raises ValueError for what cannot be asked."""

    run: str
    checkpoint: str
    split: str
    context: int | None
    batch_size: int | None
    bigram: bool
    device: str
    dtype: str | None
    threads: int | None

    def __post_init__(self) -> None:
        at_least(1, self, "context", "batch_size", "threads")
        choose("split", self.split, dict.fromkeys(("val", "train")))


def evaluate(overrides: list[str]) -> int:
    """`python eval.py`."""
    composed = compose_door(overrides, "eval", USAGE)
    if composed is None:
        return 0
    choices, position = composed.pop("choices"), composed.pop("pos", None)
    options = Options(**arguments("", composed, Options)[0])
    if position:
        asked = {override.partition("=")[0] for override in overrides}
        own = open_config(Path(options.run))["pos"]
        position |= {k: own[k] for k in own.keys() & position.keys() if f"pos.{k}" not in asked} | {
            "_target_": position["_target_"]
        }
    other = {"pos": position, "choices": choices} if position else {}
    result = score_run(options, other)
    name = "{split}_step{step}_context{context}_{dtype}".format(**result)
    if position:
        name += f"_{choices['pos']}" + "".join(
            f"-{key}-{value}" for key, value in position.items() if not key.startswith("_")
        )
    path = Path(options.run) / "eval" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    replace(path, json.dumps(result, indent=1) + "\n")
    for key in ("tokens", "context", "perplexity", "bits_per_byte", "bigram_perplexity"):
        if key in result:
            value = result[key]
            print(
                f"  {key:<17}  {value:,}" if isinstance(value, int) else f"  {key:<17}  {value:.6g}"
            )
    print(f"\nwritten: {path}")
    return 0


def score_run(options: Options, other: Config) -> dict[str, Any]:
    """Score a run as asked, with `other` parts in place of its own.

    Raises ValueError for a run, a part, a context or a text that does not fit.
    """
    run = Path(options.run)
    device = devices.pick(options.device, options.dtype or trained_dtype(run), False)
    devices.set_up(options.threads)
    model, _, config, checkpoint = open_model(run, device, options.checkpoint, other)
    context = options.context or model.shape.max_len
    if model.position.max_len is not None and context > model.position.max_len:
        raise ValueError(
            f"context={context}: pos={config['choices']['pos']} is not defined beyond "
            f"{model.position.max_len} tokens"
        )
    corpus = open_corpus(config, checkpoint)
    text, text_bytes = corpus.split(options.split)
    rows = options.batch_size or config["eval_batch_size"]
    with device.autocast(), CONSOLE.status(f"scoring {len(text):,} tokens"):
        nats, tokens = score(model, text, context=context, batch_size=rows, device=device.name)
    result = {
        "run": options.run,
        "step": checkpoint.step,
        "split": options.split,
        "context": context,
        "dtype": device.dtype_name,
        "pos": config["choices"]["pos"],
        "pos_options": {k: v for k, v in config["pos"].items() if not k.startswith("_")},
        "tokens": tokens,
        "nats": nats,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "bits_per_byte": bits_per_byte(nats, text_bytes),
        **corpus.identity,
    }
    if options.bigram:
        pairs = bigram_nats(corpus.train, text, model.shape.vocab_size)
        result["bigram_perplexity"] = perplexity(pairs / tokens)
    return result
