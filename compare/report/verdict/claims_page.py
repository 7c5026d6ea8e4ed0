"""A page on all claims: what was published, what the sweeps here say, in one word."""

import math
import shlex
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from compare.report import style
from compare.report.style import Figure
from compare.report.tables import Rows, markdown
from compare.report.verdict.claim import (
    NOT_HERE,
    OPEN,
    REPRODUCED,
    expectation,
    expected_range,
    ruler_of,
)
from data.atomic import read_json
from train.config.compose import choices_of, compose
from train.config.options import Claim, Reporting, claim_of
from train.config.schema import Config, arguments
from train.record.run_folder import load_manifest

NOT_RUN, UNFINISHED = "not run", "unfinished"
COLOURS = {
    REPRODUCED: style.COLOURS[2],
    NOT_HERE: style.COLOURS[1],
    OPEN: style.GREY,
    UNFINISHED: style.COLOURS[4],
}
WORDING = ("says", "published", "number", "source", "link")  # may be reworded after the runs


@dataclass(frozen=True)
class Asked:
    """A claim, the experiment that asks it, and what its report found; empty if it was not run."""

    experiment: str  # claims/alibi
    claim: Claim
    config: Config  # of its first run
    found: dict[str, Any]
    command: list[str]  # that its runs were last asked for with

    @property
    def name(self) -> str:
        return self.experiment.rpartition("/")[2]

    @property
    def word(self) -> str:
        if not self.found:
            return NOT_RUN
        finished = self.found["done"] == self.found["planned"]
        return str(self.found["word"]) if finished else UNFINISHED

    @property
    def text(self) -> str:
        return str(self.found.get("text", ""))


def asked(sweeps: Path) -> list[Asked]:
    """All claims in configs/experiment/claims, with the results of their sweeps in a folder.

    Raises ValueError for an experiment without a claim, and for a damaged result.
    """
    each = []
    for experiment in choices_of("experiment"):
        if not experiment.startswith("claims/") or experiment.endswith("/base"):
            continue
        config = compose([f"experiment={experiment}"])
        claim = claim_of(Reporting(**arguments("report", config["report"], Reporting)[0]))
        if claim is None:
            raise ValueError(f"experiment={experiment} has no report.claim")
        folder = sweeps / str(config["name"])
        found, command = result(folder / "results.json", claim), [f"experiment={experiment}"]
        if found and (told := load_manifest(folder).get("command")):
            command = told[1:]
        each.append(Asked(experiment, claim, config, found, command))
    return each


def result(path: Path, claim: Claim) -> dict[str, Any]:
    """What a report found; empty without one, and for a claim that was asked otherwise then.

    Raises ValueError for what is none.
    """
    if not path.exists():
        return {}
    found = read_json(path).get("claim")
    if not isinstance(found, dict) or not found.keys() >= FACTS or found["word"] not in COLOURS:
        raise ValueError(
            f"{path} has no result of a claim; python report.py {path.parent} makes it"
        )
    return found if question(found["asked"]) == question(asdict(claim)) else {}


FACTS = {
    "asked",
    "word",
    "text",
    "difference",
    "variant",
    "base",
    "done",
    "planned",
    "minutes",
    "machines",
}


def question(claim: dict[str, Any]) -> dict[str, Any]:
    """What a claim asks and expects, without its wording."""
    return {key: value for key, value in claim.items() if key not in WORDING}


def table(claims: list[Asked]) -> Rows:
    """A row for each claim: what is measured, expected, published and found, and the word."""
    rows = [["claim", "measured", "expected", "published", "here", "word"]]
    for a in claims:
        cells = (ruler_of(a.claim), expectation(a.claim), a.claim.number, a.text, a.word)
        rows.append([a.name, *cells])
    return rows


def page(claims: list[Asked], command: str, picture: str | None) -> str:
    """The page in Markdown: the table, the picture at that address, and a section for each claim.

    `command` is the one that makes it.
    """
    rows = table(claims)
    linked = [rows[0], *([f"[{row[0]}](#{row[0]})", *row[1:]] for row in rows[1:])]
    shown = [f"![differences and what was expected]({picture})", "", CAPTION, ""] if picture else []
    return "\n".join(
        [
            "# Published claims, asked again",
            "",
            INTRODUCTION.format(command=command, made=date.today()),
            markdown(linked),
            *shown,
            *(section(a) for a in claims),
        ]
    )


INTRODUCTION = """\
Claims about attention and positions, each asked again by a small sweep with several seeds. The expected sign of each was written down before its first run. A command made this page from the reports
of the sweeps, on {made}:

```sh
python train.py experiment=claims/alibi     # and so on
{command}
```

- **reproduced**: the 95 % interval over the seeds lies where the claim expects it;
- **not here**: all of it lies elsewhere;
- **open**: anything else.

The words are about these small models and short runs. *Not here* does not refute a claim about large ones, *reproduced* does not confirm it there. Each claim is tested by itself: one that does not hold
here is called reproduced with a chance of at most 2.5 %, unless seeds were added after a look.
"""


def section(a: Asked) -> str:
    """A claim: its sentence, its published numbers with their source, the command, and the result."""
    c = a.claim
    lines = [
        f"## {a.name}",
        "",
        f"{c.says} As published ([{c.source}]({c.link})): {c.published}.",
        "",
        "```sh",
        shlex.join(["python", "train.py", *a.command]),
        "```",
        "",
        f"Expected, as written on {c.written}: {ruler_of(c)} {expectation(c)}.",
    ]
    if not a.found:
        return "\n".join([*lines, "Not run yet.", ""])
    f = a.found
    sides = "" if f["variant"] == f["base"] else f", `{f['variant']}` against `{f['base']}`"
    runs = (
        f"{f['done']} runs" if f["done"] == f["planned"] else f"{f['done']} of {f['planned']} runs"
    )
    where = f" on {'; '.join(f['machines'])}" if f["machines"] else ""
    lines[-1] += f" Here{sides}: {a.text}. **{a.word.capitalize()}**."
    lines[-1] += f" {runs}, {f['minutes']:.0f} min of training steps{where}."
    notes = (line for note in a.config["report"]["notes"] for line in ("", note))
    return "\n".join([*lines, *notes, ""])


def figure(claims: list[Asked]) -> Figure | None:
    """Each difference with its interval, on a scale of its own, beside what was expected."""
    shown = [a for a in claims if a.found.get("difference")]
    return draw(shown) if shown else None


CAPTION = (
    "The difference between each claim's variant and its baseline, with its 95 % interval. Shaded is what was expected "
    "before the first run, the vertical line is no difference, and each row has a scale of its own."
)


@style.pictured("claims")
def draw(shown: list[Asked]) -> style.Drawing:
    drawing, axes = style.canvas(1, height=0.8 + 0.42 * len(shown))
    for row, a in enumerate(shown):
        mean, low, high = (a.found["difference"][key] for key in ("mean", "low", "high"))
        low, high = (mean if end is None else end for end in (low, high))
        ends = expected_range(a.claim)
        margin = max((abs(end) for end in ends if math.isfinite(end)), default=0.0)
        scale = 1.1 * max(abs(low), abs(high), margin) or 1.0
        from_, to = (max(-1.0, min(1.0, end / scale)) for end in ends)
        axes.barh(row, to - from_, left=from_, height=0.7, color=style.COLOURS[5], alpha=0.2)
        look = {"color": COLOURS[a.word], "linewidth": 1.8}
        axes.plot([low / scale, high / scale], [row, row], **look)
        axes.plot([mean / scale], [row], "o", markersize=5, **look)
        said = f"{a.text.partition(',')[0]}  {a.word}"
        axes.text(1.05, row, said, va="center", fontsize=8)
    axes.axvline(0, color=style.INK, linewidth=0.8, alpha=0.5)
    labels = [f"{a.name}: {ruler_of(a.claim)}".replace(", ", ",\n") for a in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set(xlim=(-1, 1), ylim=(len(shown) - 0.4, -0.6))
    axes.set_xticks([])
    axes.grid(visible=False)
    return drawing, CAPTION
