"""The README tells the truth: its commands compose, and its example scheme works."""

import re
import shlex
from pathlib import Path

import pytest

from cli.entry import compose_command
from cli.evaluate import with_commas
from model.position.base import Position
from train.config.compose import choices_of, compose, expand

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
COMMANDS = sorted(
    {
        line.split("#")[0].strip().replace(".venv/bin/", "").replace("uv run --no-sync ", "python ")
        for line in README.splitlines()
        if re.match(r"(\.venv/bin/|uv run --no-sync )?(python )?(train|eval|sample|report)\.py|python \w+\.py|"
                    r"\.venv/bin/python \w+\.py", line)
    }
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_one_that_works(command: str) -> None:
    _, door, *overrides = shlex.split(command)
    if "--help" in overrides:
        return
    if door == "train.py":
        for cell in expand([o for o in overrides if o != "-m"]):
            compose(cell)
    elif door == "report.py":
        assert overrides
    else:
        assert (
            compose_command([*map(with_commas, overrides)], door.removesuffix(".py"), "")
            is not None
        )


def test_the_commands_were_found() -> None:
    assert len(COMMANDS) >= 10
    assert {command.split()[1] for command in COMMANDS} == {
        "train.py",
        "eval.py",
        "sample.py",
        "report.py",
    }


def test_every_choice_is_named() -> None:
    for group in ("attn", "pos", "model", "data", "optim", "experiment"):
        for choice in choices_of(group):
            assert f"`{choice}`" in README, f"{group}={choice}"


def test_the_example_scheme_is_a_scheme() -> None:
    code, yaml = (
        re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)[1] for kind in ("python", "yaml")
    )
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    path = re.search(r"_target_: (\S+)", yaml)[1]
    scheme = names[path.rsplit(".", 1)[1]]
    assert issubclass(scheme, Position)
    assert f"`{path.rsplit('.', 1)[0].replace('.', '/')}.py`" in README
