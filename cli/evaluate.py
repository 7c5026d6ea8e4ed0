"""`python eval.py`: which question is asked of which runs."""

import importlib

from cli.entry import compose_door
from train.config.compose import quoted

USAGE = """\
Ask finished runs what they are worth, and what they cost to serve. Prints the answer and writes it
as JSON under RUN/eval/; the report of a sweep shows what was measured of its runs.

  python eval.py run=DIR [eval=KIND] [KEY=VALUE ...]

Examples
  python eval.py run=outputs/runs/mine                          perplexity of the validation text
  python eval.py run=outputs/runs/mine context=128 stride=32    each token with at least 96 before it
  python eval.py run=outputs/runs/mine data.path="my/*.txt"     of any other text
  python eval.py run=outputs/runs/mine against=outputs/runs/other
  python eval.py run=outputs/runs/mine context=512 pos=rope_yarn pos.factor=4
  python eval.py run=outputs/sweeps/grid eval=length            beyond the context of training
  python eval.py run=outputs/runs/a,outputs/runs/b eval=decode  speed and cache of generation
  python eval.py run=outputs/runs/mine eval=attention           what its heads look at
  python eval.py run=outputs/runs/mine eval=harness tasks=my_task.yaml
"""


def evaluate(overrides: list[str]) -> int:
    """`python eval.py`: exit code 0, or ValueError for what cannot be asked."""
    overrides = [with_commas(text) for text in overrides]
    composed = compose_door(overrides, "eval", USAGE)
    if composed is None:
        return 0
    from compare.evaluate.load import asked

    kind = importlib.import_module(f"compare.evaluate.{composed['choices']['eval']}")
    return int(kind.evaluate(*asked(overrides, composed, kind.Options)))


def with_commas(override: str) -> str:
    """run=A,B and tasks=A,B as one text: a list of them, not a sweep over them."""
    key, equals, value = override.partition("=")
    listed = key in ("run", "tasks") and equals and "," in value
    return f"{key}={quoted(value)}" if listed else override
