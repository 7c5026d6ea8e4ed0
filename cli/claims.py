"""`python -m cli.claims`: a page on the published claims that were asked again."""

import os
import shlex
import sys
from pathlib import Path

from cli.entry import options_of, run_command
from compare.report.verdict.claims_page import asked, figure, page, table
from data.atomic import replace
from train.record.terminal import columns

USAGE = """\
Gather what the sweeps of experiment=claims/* found, and write a page on it, with a picture.

  python -m cli.claims [to=outputs/claims.md] [figure=outputs/figures/claims.svg] [sweeps=outputs/sweeps]

A claim is asked by its sweep, and is not run until then:

  python train.py experiment=claims/alibi
"""
DEFAULTS = {
    "to": "outputs/claims.md",
    "figure": "outputs/figures/claims.svg",
    "sweeps": "outputs/sweeps",
}


def main(arguments: list[str]) -> int:
    """`python -m cli.claims`. Raises ValueError for an unknown key."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    given = options_of(arguments, DEFAULTS)
    options = {key: Path(value) for key, value in (DEFAULTS | given).items()}
    to, drawn, sweeps = options["to"], options["figure"], options["sweeps"]
    if to.suffix != ".md" or drawn.suffix != ".svg":
        raise ValueError(f"to={to} figure={drawn}: a page is a .md, its picture an .svg")
    if not sweeps.is_dir():
        raise ValueError(
            f"sweeps={sweeps} is no folder; python train.py experiment=claims/alibi makes it"
        )
    claims = asked(sweeps)
    print(columns(table(claims)))
    for path in (to, drawn):
        path.parent.mkdir(parents=True, exist_ok=True)
    picture, address = figure(claims), None
    if picture:
        picture.write(drawn)
        address = Path(os.path.relpath(drawn, to.parent)).as_posix()
    command = shlex.join(["python", "-m", "cli.claims", *arguments])
    replace(to, page(claims, command, address))
    print(f"written: {to}")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
