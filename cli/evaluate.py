"""`python eval.py`: evaluate finished runs."""

import importlib
from typing import Any

from cli.entry import compose_command
from train.config.compose import quoted
from train.config.old_spellings import current_overrides

USAGE = """\
Evaluate finished runs: quality, length extrapolation, decoding speed, attention, benchmark tasks.
Prints the result and writes it as JSON to RUN/eval/. The report of a sweep includes the results of
its runs.

  python eval.py run=DIR [eval=KIND] [KEY=VALUE ...]

Examples
  python eval.py run=outputs/runs/mine                          perplexity on the validation split
  python eval.py run=outputs/runs/mine context=128 stride=32    at least 96 tokens of context for each token
  python eval.py run=outputs/runs/mine data.path="my/*.txt"     on any other text
  python eval.py run=outputs/runs/mine reference=outputs/runs/other
  python eval.py run=outputs/runs/mine context=512 pos=rope_yarn pos.factor=4
  python eval.py run=outputs/sweeps/grid eval=length            beyond the training context
  python eval.py run=outputs/runs/a,outputs/runs/b eval=decode  decoding speed and KV cache size
  python eval.py run=outputs/runs/mine eval=attention           what the heads attend to
  python eval.py run=outputs/runs/mine eval=harness tasks=my_task.yaml
"""


def evaluate(overrides: list[str]) -> int:
    """`python eval.py`: the exit code. Raises ValueError for invalid input."""
    found = opened(overrides)
    return 0 if found is None else int(found[0].evaluate(*found[1:]))


def opened(overrides: list[str]) -> tuple[Any, ...] | None:
    """The module of an evaluation, the runs and its options; None after printing a help page."""
    overrides = [with_commas(text) for text in current_overrides("eval", overrides)]
    composed = compose_command(overrides, "eval", USAGE)
    if composed is None:
        return None
    from compare.evaluate.load import parse_options

    name = composed["choices"]["eval"].replace("/", ".")
    kind = importlib.import_module(f"compare.evaluate.{name}")
    return kind, *parse_options(overrides, composed, kind.Options)


def with_commas(override: str) -> str:
    """An override with run=A,B and tasks=A,B quoted: a list of names, not a sweep over them."""
    key, equals, value = override.partition("=")
    listed = key in ("run", "tasks") and equals and "," in value
    return f"{key}={quoted(value)}" if listed else override
