"""The style of all figures: SVG that reads on white and on black, one style per variant."""

import functools
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib
from matplotlib.figure import Figure as Canvas

from compare.report.analysis import Study
from compare.report.variants import Variant
from data.atomic import replace

P = ParamSpec("P")
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
    """A picture and its caption."""

    name: str  # of its file
    caption: str
    svg: str  # an element for a page, in the colour of its text

    @property
    def file(self) -> str:
        """The picture as a file: dark on white, or light on black if the reader's system is dark."""
        head, rest = self.svg.split(">", 1)
        return f"{head}>\n{ALONE}{rest}\n"

    def write(self, path: Path) -> None:
        """Write the file, and say where."""
        path.parent.mkdir(exist_ok=True)
        replace(path, self.file)
        print(f"\nwritten: {path}")


@dataclass(frozen=True)
class Style:
    """The colour, line and marker of a variant in all figures."""

    colour: str
    line: str
    marker: str

    @property
    def plot(self) -> dict[str, Any]:
        """Options of `axes.plot` for a curve."""
        return {
            "color": self.colour,
            "linestyle": self.line,
            "marker": self.marker,
            "markersize": 4,
        }


Styles = dict[Variant, Style]
Drawing = tuple[Canvas, str]  # a figure of matplotlib and its caption
Draw = Callable[[Study, Styles], Drawing | None]  # None: these runs have nothing to draw


def styles_of(study: Study) -> Styles:
    """A style per variant: the factor with most levels sets the colour, the others line and marker.

    Where there are more combinations of the others than lines, each variant has its own colour.
    """
    factors = dict.fromkeys(key for v in study.variants for key in v.factors)
    levels = {f: list(dict.fromkeys(v.level(f) for v in study.variants)) for f in factors}
    most = max(map(len, levels.values()), default=0)
    by_colour = next((f for f in ("pos", *levels) if len(levels.get(f, ())) == most), "")
    others = {v: v.without(by_colour).levels for v in study.variants}
    combinations = list(dict.fromkeys(others.values()))
    if len(combinations) > len(LINES) and len(study.variants) <= len(COLOURS):
        looks = zip(study.variants, COLOURS, MARKERS, strict=False)
        return {v: Style(colour, "-", marker) for v, colour, marker in looks}
    styles = {}
    for v in study.variants:
        hue = levels[by_colour].index(v.level(by_colour)) if by_colour else 0
        form = combinations.index(others[v]) + hue // len(COLOURS) * len(combinations)
        styles[v] = Style(
            COLOURS[hue % len(COLOURS)], LINES[form % len(LINES)], MARKERS[form % len(MARKERS)]
        )
    return styles


def render(name: str, draw: Draw, study: Study, styles: Styles) -> Figure | None:
    """A figure under its name, in the settings of all figures; None if there is nothing to draw."""
    with matplotlib.rc_context(SETTINGS):
        drawing = draw(study, styles)
        return drawing and Figure(name, drawing[1], svg(drawing[0], name))


def pictured(name: str) -> Callable[[Callable[P, Drawing]], Callable[P, Figure]]:
    """Decorates a function that draws: it returns the figure of that name, in the settings of all."""

    def decorate(draw: Callable[P, Drawing]) -> Callable[P, Figure]:
        @functools.wraps(draw)
        def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
            with matplotlib.rc_context(SETTINGS):
                drawing, caption = draw(*args, **kwargs)
                return Figure(name, caption, svg(drawing, name))

        return drawn

    return decorate


def canvas(panels: int, height: float, rows: int = 1) -> tuple[Canvas, Any]:
    """A transparent figure with panels in rows, and its axes: an array, or one alone."""
    figure = Canvas(figsize=(8.2, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots(rows, panels // rows, squeeze=False).flatten()
    for one in axes:
        one.patch.set_alpha(0)
    return figure, axes[0] if panels == 1 else axes


def whiskers(
    mean: float, low: float | None, high: float | None, scale: float = 1.0
) -> list[list[float]] | None:
    """How far an interval reaches below and above its mean, for `errorbar`; None without one."""
    if low is None or high is None:
        return None
    return [[scale * (mean - low)], [scale * (high - mean)]]


def legend(axes: Any, lines: int) -> None:
    """The legend of a single panel, if it has several lines."""
    if lines > 1:
        axes.legend(frameon=False, ncols=1 + (lines > 4))


def legend_below(figure: Canvas, axes: Any) -> None:
    """The legend of several panels, below them, with the labels of one of them."""
    handles, labels = axes.get_legend_handles_labels()
    fitting = 118 // (8 + max(map(len, labels)))  # columns; a figure is about 118 characters wide
    ncols = max(1, min(4, fitting))
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols, frameon=False)


def svg(figure: Canvas, name: str) -> str:
    """A figure as an SVG element that takes the colour of the text around it."""
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):  # the same picture is the same file
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", text)
    return re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"', r"\1", text, count=1)
