"""Which attention scores can be an angle: each one fitted to the cosine between key and query.

Shapes: N pairs of unit vectors, Dh channels, ds width of additive scores.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from compare.report.style import COLOURS, LINES, MARKERS, Drawing, canvas, pictured

PAIRS = 4000  # to fit, and as many held out
DIMS = (2, 8)
WIDTHS = (4, 16, 64, 256)
STEPS = 150


class Dot(nn.Module):
    """k . q / sqrt(Dh), times a gain: the only one without parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return self.gain * (q * k).sum(-1) / math.sqrt(q.size(-1))


class Multiplicative(nn.Module):
    """k^T W q / sqrt(Dh)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(dim, dim))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return (q @ self.W.mT * k).sum(-1) / math.sqrt(q.size(-1))


class Concatenated(nn.Module):
    """w . [k; q]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2 * dim))

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.cat((k, q), dim=-1) @ self.w


class Additive(nn.Module):
    """w . tanh(W_k k + W_q q + b), b zero unless `biased`.

    Without b the score is odd: -k and -q give minus the score, where the angle stays the same.
    """

    def __init__(self, dim: int, width: int, biased: bool) -> None:
        super().__init__()
        self.W_k = nn.Parameter(0.1 * torch.randn(width, dim))
        self.W_q = nn.Parameter(0.1 * torch.randn(width, dim))
        self.w = nn.Parameter(torch.randn(width) / math.sqrt(width))
        self.b = nn.Parameter(torch.randn(width)) if biased else None

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        hidden = nn.functional.linear(q, self.W_q, self.b) + k @ self.W_k.mT  # (N, ds)
        return hidden.tanh() @ self.w


@dataclass(frozen=True)
class Case:
    """A score to fit, for vectors of `dim` channels."""

    name: str
    dim: int
    width: int | None  # of additive scores
    make: Callable[[], nn.Module]


def cases() -> Iterator[Case]:
    """Every score, additive ones at each width, in each number of channels."""
    for dim in DIMS:
        yield Case("scaled dot product", dim, None, Dot)
        yield Case("multiplicative", dim, None, partial(Multiplicative, dim))
        yield Case("concatenated", dim, None, partial(Concatenated, dim))
        for biased, name in ((False, "additive"), (True, "additive, with biases")):
            for width in WIDTHS:
                yield Case(name, dim, width, partial(Additive, dim, width, biased))


@dataclass(frozen=True)
class Fit:
    """How much of the cosine's variance a fitted score explains, on pairs that it was not fitted to."""

    case: Case
    parameters: int
    r2: float


def fit(case: Case) -> Fit:
    """Least squares by L-BFGS, with an offset for every score."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        q, k = (nn.functional.normalize(torch.randn(2 * PAIRS, case.dim), dim=-1) for _ in "qk")
        score = case.make()
    cosine = (q * k).sum(-1)
    parameters = [torch.zeros((), requires_grad=True), *score.parameters()]
    offset = parameters[0]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=STEPS,
        history_size=20,
        line_search_fn="strong_wolfe",
        tolerance_change=1e-10,
    )

    def error(pairs: slice) -> Tensor:
        return (score(q[pairs], k[pairs]) + offset - cosine[pairs]).square().mean()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = error(slice(PAIRS))
        loss.backward()
        return loss

    optimizer.step(closure)
    held_out = slice(PAIRS, None)
    with torch.no_grad():
        r2 = 1 - (error(held_out) / cosine[held_out].var()).item()
    return Fit(case, sum(p.numel() for p in parameters), r2)


def table(fits: list[Fit]) -> list[list[str]]:
    """A row for each score, and its R^2 on held-out pairs."""
    rows = [["score", "channels", "width", "numbers fitted", "held-out R^2"]]
    for one in fits:
        width = "" if one.case.width is None else str(one.case.width)
        sizes = [str(one.case.dim), width, f"{one.parameters:,}"]
        rows.append([one.case.name, *sizes, f"{one.r2:.4f}"])
    return rows


@pictured("scores")
def draw(fits: list[Fit]) -> Drawing:
    """R^2 against the width of additive scores; the others have none."""
    figure, panels = canvas(len(DIMS), height=3.6)
    names = [*dict.fromkeys(one.case.name for one in fits)]
    for dim, axes in zip(DIMS, panels, strict=True):
        for i, name in enumerate(names):
            r2 = {f.case.width: f.r2 for f in fits if (f.case.name, f.case.dim) == (name, dim)}
            look = {"color": COLOURS[i], "label": name}
            if None in r2:
                axes.axhline(r2[None], linestyle=LINES[1 + i], **look)
            else:
                axes.plot([*r2], [*r2.values()], marker=MARKERS[i], **look)
        axes.set_xscale("log", base=2)
        axes.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        axes.set(title=f"{dim} channels", xlabel="width of additive scores")
    panels[0].set(ylabel="held-out R²")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    caption = (
        f"Each score fitted to the cosine of the angle between {PAIRS:,} random pairs of unit vectors: "
        "the share of its variance that is explained on as many other pairs."
    )
    return figure, caption
