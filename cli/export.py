"""`python -m cli.export`: write a run as a Hugging Face model folder."""

import sys
from pathlib import Path

from cli.entry import run_command
from compare.evaluate.export import export
from compare.evaluate.load import RunSelector
from train.config.compose import parse
from train.config.schema import arguments

USAGE = """\
Write a finished run as a Hugging Face model folder, if transformers has an equivalent architecture:

  python -m cli.export run=DIR to=FOLDER [checkpoint=latest]

  rope and its scalings, mha, gqa or mqa, swiglu, rmsnorm     Llama; with attn=sliding Mistral, attn.qk_norm=true Qwen3
  rope and its scalings, gelu, gelu_tanh or relu2, layernorm  Starcoder2
  learned, sinusoidal or none, any of these, layernorm        GPT-2
  alibi, gelu, layernorm, no biases                           MPT

Any other combination is an error. If transformers is installed, the folder is loaded and its logits
and tokens are compared with the run's. `python train.py init_from=FOLDER` starts from such a folder, or
from any other model of these architectures.
"""


def main(overrides: list[str]) -> int:
    """`python -m cli.export`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    given = {override.key_or_group: override.value() for override in parse(overrides)}
    print(export_run(**arguments("", {"checkpoint": "latest"} | given, export_run)[0]))
    return 0


def export_run(*, run: str, to: str, checkpoint: str) -> str:
    """Export a run; its keyword arguments are the keys of the command."""
    folder = Path(to)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"to={to} exists and is not an empty folder")
    selector = RunSelector(
        run=run, checkpoint=checkpoint, device="cpu", dtype="float32", threads=None
    )
    return export(selector.load(selector.only), folder)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
