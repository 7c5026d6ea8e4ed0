"""What all figures share: matplotlib SVG that reads on white and on black, one style per variant."""

import io
import re
from dataclasses import dataclass
from typing import Any

from compare.report.analysis import Study
from compare.report.variants import Variant, plain

GREY = "#888888"

#: Okabe and Ito's colours that stand out on white and on black, then a grey and a violet.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY, "#8E6BBF")
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
INK = "#010203"  # replaced by the colour of the text around
# A page can be dark while the reader's system is light, so a file brings a background of its own:
ALONE = (
    "<style>svg{color:#1b1d21}.ground{fill:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e7e9ec}.ground{fill:#0d1117}}</style>"
    '<rect class="ground" width="100%" height="100%"/>'
)
INKED = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color grid.color".split()
SETTINGS: dict[Any, Any] = {
    **dict.fromkeys(INKED, INK),
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Figure:
    """One picture, with the words that belong below it."""

    name: str  # of its file
    caption: str
    svg: str  # an element for a page, in the colour of its text

    @property
    def file(self) -> str:
        """The picture as a file: dark on white, or light on black if the reader's system is dark."""
        head, rest = self.svg.split(">", 1)
        return f"{head}>\n{ALONE}{rest}\n"


@dataclass(frozen=True)
class Style:
    """How a variant looks, everywhere."""

    colour: str
    line: str
    marker: str


def styles_of(found: Study) -> dict[int, Style]:
    """A style for each variant: the colour tells the factor with most levels, line and marker tell the
    others. Where lines do not suffice for that, each variant has a colour of its own."""
    levels = {
        factor: list(dict.fromkeys(plain(v.factors.get(factor)) for v in found.variants))
        for factor in dict.fromkeys(key for v in found.variants for key in v.factors)
    }
    most = max(map(len, levels.values()), default=0)
    by_colour = next((f for f in ("pos", *levels) if len(levels.get(f, ())) == most), "")
    combinations = list(dict.fromkeys(rest_of(v, by_colour) for v in found.variants))
    if len(combinations) > len(LINES) and len(found.variants) <= len(COLOURS):
        return {
            id(v): Style(c, "-", m)
            for v, c, m in zip(found.variants, COLOURS, MARKERS, strict=False)
        }
    styles = {}
    for v in found.variants:
        hue = levels[by_colour].index(plain(v.factors.get(by_colour))) if by_colour else 0
        form = combinations.index(rest_of(v, by_colour)) + hue // len(COLOURS) * len(combinations)
        styles[id(v)] = Style(
            COLOURS[hue % len(COLOURS)], LINES[form % len(LINES)], MARKERS[form % len(MARKERS)]
        )
    return styles


def rest_of(v: Variant, factor: str) -> tuple[str, ...]:
    """The levels of a variant's other factors."""
    return tuple(plain(level) for key, level in v.factors.items() if key != factor)


def canvas(panels: int, height: float, rows: int = 1) -> tuple[Any, Any]:
    """A figure with so many panels in rows, on no ground of its own."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(8.2, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, panels // rows, squeeze=False).flatten()
    for one in axes:
        one.patch.set_alpha(0)
    return figure, axes[0] if panels == 1 else axes


def legend(axes: Any, lines: int) -> None:
    if lines > 1:
        axes.legend(frameon=False, ncols=1 + (lines > 4))


def svg(figure: Any, name: str) -> str:
    """A figure as an SVG element that takes the colour of the text around it."""
    import matplotlib

    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same picture is the same file
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
