"""A page on all claims: what was published, what the sweeps here say, in one word."""

from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib

from compare.report import style
from compare.report.style import Drawing, Figure, svg
from compare.report.tables import Rows, markdown
from compare.report.verdict.claim import NOT_HERE, OPEN, REPRODUCED
from data.atomic import read_json
from train.config.compose import choices_of, compose
from train.config.options import Claim, Reporting, claim_of
from train.config.schema import Config, arguments

NOT_RUN = "not run"
COLOURS = {REPRODUCED: style.COLOURS[2], NOT_HERE: style.COLOURS[1], OPEN: style.GREY}


@dataclass(frozen=True)
class Asked:
    """A claim, the experiment that asks it, and what its report found; empty if it was not run."""

    experiment: str  # claims/alibi
    claim: Claim
    config: Config  # of its first run
    found: dict[str, Any]

    @property
    def name(self) -> str:
        return self.experiment.rpartition("/")[2]

    @property
    def word(self) -> str:
        return str(self.found.get("word", NOT_RUN))


def asked(sweeps: Path) -> list[Asked]:
    """All claims in configs/experiment/claims, with the results of their sweeps in a folder."""
    each = []
    for experiment in choices_of("experiment"):
        if not experiment.startswith("claims/") or experiment.endswith("/base"):
            continue
        config = compose([f"experiment={experiment}"])
        claim = claim_of(Reporting(**arguments("report", config["report"], Reporting)[0]))
        if claim is None:
            raise ValueError(f"experiment={experiment} has no report.claim")
        path = sweeps / str(config["name"]) / "results.json"
        found = read_json(path).get("claim", {}) if path.exists() else {}
        each.append(Asked(experiment, claim, config, found))
    return each


def table(claims: list[Asked]) -> Rows:
    """A row for each claim: what is measured, expected, published and found, and the word."""
    rows = [["claim", "measured", "expected", "published", "here", "word"]]
    for a in claims:
        found = {"ruler": a.claim.ruler, "expectation": a.claim.expected, "text": ""} | a.found
        cells = (found["ruler"], found["expectation"], a.claim.number, found["text"], a.word)
        rows.append([a.name, *cells])
    return rows


def page(claims: list[Asked], picture: str) -> str:
    """The page in Markdown, with the table, the picture at that address, and a section for each claim."""
    rows = table(claims)
    linked = [rows[0], *([f"[{row[0]}](#{row[0]})", *row[1:]] for row in rows[1:])]
    return "\n".join(
        [
            "# Published claims, asked again",
            "",
            INTRODUCTION.format(n=len(claims), made=date.today()),
            markdown(linked),
            f"![each difference with its interval, beside what was expected]({picture})",
            "",
            *(section(a) for a in claims),
        ]
    )


INTRODUCTION = """\
{n} claims about attention and positions, each asked again by a small sweep with several seeds. What was expected was written before the first run of each. This page is made by a command,
from the reports of the sweeps, on {made}:

```sh
python train.py experiment=claims/alibi     # and so on
python -m cli.claims to=docs/results/claims.md
```

- **reproduced**: the 95 % interval over the seeds lies where the claim expects it;
- **not here**: all of it lies elsewhere;
- **open**: anything else; more seeds may tell.

The words are about these small models and short runs. *Not here* does not refute a claim about large ones, *reproduced* does not confirm it there. Each claim is tested by itself: one that does not hold
here is called reproduced with a chance of at most 2.5 %.
"""


def section(a: Asked) -> str:
    """A claim: its sentence, its published numbers with their source, the command, and the result."""
    c = a.claim
    lines = [
        f"## {a.name}",
        "",
        f"{c.says} [{c.source}]({c.link}): {c.published}.",
        "",
        "```sh",
        f"python train.py experiment={a.experiment}",
        "```",
        "",
    ]
    if not a.found:
        return "\n".join([*lines, "Not run yet.", ""])
    f = a.found
    sides = "" if f["variant"] == f["base"] else f", `{f['variant']}` against `{f['base']}`"
    text = f"Expected ({c.written}): {f['expectation']}. Here {f['ruler']}{sides}: {f['text']}: **{f['word']}**."
    where = (
        f"{f['runs']} runs, {f['minutes']:.0f} min of training steps on {'; '.join(f['machines'])}."
    )
    return "\n".join([*lines, f"{text} {where}", ""])


def figure(claims: list[Asked]) -> Figure | None:
    """Each difference with its interval, on a scale of its own, beside what was expected."""
    shown = [a for a in claims if a.found.get("difference")]
    if not shown:
        return None
    with matplotlib.rc_context(style.SETTINGS):
        drawing, caption = draw(shown)
        return Figure("claims", caption, svg(drawing, "claims"))


def draw(shown: list[Asked]) -> Drawing:
    drawing, axes = style.canvas(1, height=0.8 + 0.42 * len(shown))
    for row, a in enumerate(shown):
        mean, low, high = (a.found["difference"][key] for key in ("mean", "low", "high"))
        low, high = (mean if end is None else end for end in (low, high))
        ends = a.found["expected_range"]
        scale = 1.1 * max(abs(low), abs(high), *(abs(end or 0) for end in ends))
        from_, to = (
            sign * scale if end is None else end for sign, end in zip((-1, 1), ends, strict=True)
        )
        axes.barh(
            row,
            (to - from_) / scale,
            left=from_ / scale,
            height=0.7,
            color=style.COLOURS[5],
            alpha=0.2,
        )
        look = {"color": COLOURS[a.word], "linewidth": 1.8}
        axes.plot([low / scale, high / scale], [row, row], **look)
        axes.plot([mean / scale], [row], "o", markersize=5, **look)
        axes.text(
            1.05, row, f"{a.found['text'].partition(',')[0]}  {a.word}", va="center", fontsize=8
        )
    axes.axvline(0, color=style.INK, linewidth=0.8, alpha=0.5)
    labels = [f"{a.name}: {a.found['ruler']}" for a in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=8)
    axes.set(xlim=(-1, 1), ylim=(len(shown) - 0.4, -0.6))
    axes.set_xticks([])
    axes.grid(visible=False)
    return drawing, (
        "The difference between each claim's variant and its baseline, with its 95 % interval. Shaded: what was "
        "expected before the first run. The vertical line is no difference; each row has a scale of its own."
    )
