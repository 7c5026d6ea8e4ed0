"""Shared by all commands: one-line errors, help pages and configs."""

import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable

from train.config.compose import CONFIGS, choices_of, compose, keys_of
from train.config.schema import Config

EXIT_CODES = """
Exit codes: 0 done; 1 a sweep with failed runs or evaluations; 2 bad input; 3 training stopped (non-finite loss, disk
full); 130 or 143 interrupted, state saved. HEAD_TO_HEAD_TRACEBACK=1 prints tracebacks."""


def run_command(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run a command and return its exit code; bad input is one line on stderr and exit code 2.

    HEAD_TO_HEAD_TRACEBACK=1 raises the error instead.
    """
    try:
        return main(arguments)
    except (ValueError, OSError) as error:
        if os.environ.get("HEAD_TO_HEAD_TRACEBACK"):
            raise
        from train.record.terminal import printable

        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def options_of(arguments: list[str], known: Iterable[str]) -> dict[str, str]:
    """KEY=VALUE of a command without a config. Raises ValueError for a key that it does not have."""
    options = dict(a.partition("=")[::2] for a in arguments)
    if unknown := options.keys() - set(known):
        raise ValueError(f"{min(unknown)}: no such key; known: {', '.join(known)}")
    return options


def compose_command(overrides: list[str], name: str, usage: str) -> Config | None:
    """The config of a command; None after printing its help page, if that is requested."""
    if {"-h", "--help"} & set(overrides):
        print(help_page(usage, name))
        return None
    return compose(overrides, door=name)


def help_page(usage: str, config: str) -> str:
    """A command's usage, its config groups with their choices, and its keys with their comments."""
    text = (CONFIGS / f"{config}.yaml").read_text()
    groups = re.findall(r"^  - (?:optional )?([a-z]+): (\w+)", text, re.MULTILINE)
    lines = [usage]
    if groups:
        lines.append(
            "Groups (GROUP=CHOICE; '*' marks the default; a choice is a file configs/GROUP/CHOICE.yaml)"
        )
        for group, default in groups:
            names = [f"*{c}" if c == default else c for c in choices_of(group)]
            lines.append(f"  {group:<11} {'  '.join(names)}")
        lines.append("")
        for group in (group for group, _ in groups if group not in ("experiment", "eval")):
            keys = {k for c in choices_of(group) for k in keys_of(CONFIGS / group / f"{c}.yaml")}
            lines.append(f"  {group}.*  {' '.join(sorted(keys))}")
        lines.append("")
    lines.append("Keys (KEY=VALUE; numbers may be written 1e3)")
    lines.append(textwrap.indent(text.split("\n\n", 1)[1].rstrip(), "  "))
    for kind in choices_of("eval") if "eval" in dict(groups) else []:
        keys_of_kind = (CONFIGS / "eval" / f"{kind}.yaml").read_text().rstrip().partition("\n")[2]
        lines.append(f"\nKeys of eval={kind}\n{textwrap.indent(keys_of_kind, '  ')}")
    lines.append(EXIT_CODES)
    return "\n".join(lines)
