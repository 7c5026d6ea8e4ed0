"""`python -m cli.export`: a run as a Hugging Face folder."""

import sys
from pathlib import Path

from cli.entry import door
from compare.evaluate.export import Options, export
from compare.evaluate.load import Opening
from train.config.compose import parse
from train.config.schema import arguments

USAGE = """\
Write a finished run as a folder that transformers loads, if it has a model that computes the same:

  python -m cli.export run=DIR to=FOLDER [checkpoint=latest]

  rope and its scalings, mha, gqa or mqa, swiglu, rmsnorm     Llama; with attn=sliding Mistral, attn=qk_norm Qwen3
  rope and its scalings, gelu, gelu_tanh or relu2, layernorm  Starcoder2
  learned, sinusoidal or none, any of these, layernorm        GPT-2
  alibi, gelu, layernorm, no biases                           MPT

All else is refused. With transformers installed the folder is loaded again, and its logits and tokens
are compared. `python train.py init_from=FOLDER` starts from it, or from others of these families.
"""


def main(overrides: list[str]) -> int:
    """`python -m cli.export`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    asked = {override.key_or_group: override.value() for override in parse(overrides)}
    options = Options(**arguments("", {"checkpoint": "latest"} | asked, Options)[0])
    to = Path(options.to)
    if to.exists() and not (to.is_dir() and not any(to.iterdir())):
        raise ValueError(f"to={to} exists already, and is not an empty folder")
    opening = Opening(
        run=options.run,
        checkpoint=options.checkpoint,
        device="cpu",
        dtype="float32",
        threads=None,
    )
    print(export(opening.open(opening.only), to))
    return 0


if __name__ == "__main__":
    sys.exit(door(main, sys.argv[1:]))
