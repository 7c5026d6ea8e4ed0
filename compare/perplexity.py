"""What a checkpoint is worth: its perplexity on every token of a split."""

import json
from pathlib import Path

from model.score import bits_per_byte, perplexity, score
from train import device as devices
from train.cli import compose_door
from train.config import arguments, choose
from train.job import at_least
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
"""


class Options:
    """The keys of eval.yaml, checked."""

    def __init__(
        self,
        *,
        run: str,
        checkpoint: str,
        split: str,
        context: int | None,
        batch_size: int | None,
        device: str,
        dtype: str | None,
        threads: int | None,
    ) -> None:
        at_least(1, context=context, batch_size=batch_size, threads=threads)
        choose("split", split, {"val": 0, "train": 0})
        self.run, self.checkpoint, self.split = Path(run), checkpoint, split
        self.context, self.batch_size = context, batch_size
        self.device, self.dtype, self.threads = device, dtype, threads


def evaluate(overrides: list[str]) -> int:
    """`python eval.py`."""
    composed = compose_door(overrides, "eval", USAGE)
    if composed is None:
        return 0
    options = Options(**arguments("", composed, Options)[0])
    config = open_config(options.run)
    device = devices.pick(options.device, options.dtype or trained_dtype(options.run), False)
    devices.set_up(options.threads)
    model, _, _, checkpoint = open_model(options.run, device, options.checkpoint)
    context = options.context or model.shape.max_len
    if model.position.max_len is not None and context > model.position.max_len:
        raise ValueError(
            f"context={context}: pos={config['choices']['pos']} is not defined beyond "
            f"{model.position.max_len} tokens"
        )
    corpus = open_corpus(config, checkpoint)
    text, text_bytes = corpus.split(options.split)
    with device.autocast():
        nats, tokens = score(
            model,
            text,
            context=context,
            batch_size=options.batch_size or config["eval_batch_size"],
            device=device.name,
        )
    result = {
        "run": str(options.run),
        "step": checkpoint.step,
        "split": options.split,
        "context": context,
        "dtype": device.dtype_name,
        "tokens": tokens,
        "nats": nats,
        "loss": nats / tokens,
        "perplexity": perplexity(nats / tokens),
        "bits_per_byte": bits_per_byte(nats, text_bytes),
        "data_fingerprint": corpus.fingerprint,
        "tokenizer_sha256": corpus.tokenizer_sha256,
    }
    folder = options.run / "eval"
    folder.mkdir(exist_ok=True)
    path = (
        folder / f"{options.split}_step{checkpoint.step}_context{context}_{device.dtype_name}.json"
    )
    replace(path, json.dumps(result, indent=1) + "\n")
    for key in ("tokens", "context", "loss", "perplexity", "bits_per_byte"):
        print(f"  {key:<13}  {result[key]:,.6g}" if key != "tokens" else f"  {key:<13}  {tokens:,}")
    print(f"\nwritten: {path}")
    return 0
