"""Ways of finetuning in a report: the share of full finetuning's gain, for how many trained numbers."""

import math
from dataclasses import dataclass

from compare.report import style
from compare.report.analysis import Study
from compare.report.style import Drawing, Styles
from compare.report.tables import Rows, number, table_of, without_empty
from compare.report.variants import Variant
from compare.statistics.paired import mean_interval, with_interval

RATE = "optim.lr"


@dataclass(frozen=True)
class Method:
    """A way of finetuning at the best of the learning rates that were tried for it."""

    best: Variant
    shares: list[float]  # of full finetuning's gain, one per seed that both have

    @property
    def label(self) -> str:
        return self.best.without(RATE).label

    @property
    def trained(self) -> float:
        """Trained parameters."""
        return self.best.median("params_trained") or 0.0

    @property
    def share(self) -> tuple[float, float | None, float | None]:
        """The mean share with its interval over seeds."""
        return mean_interval(self.shares)


def methods(study: Study) -> list[Method]:
    """The ways of finetuning compared, full finetuning among them; none without it.

    The gain is counted from the loss of the parent, which full finetuning starts with.
    """
    tried: dict[tuple[str, ...], list[Variant]] = {}
    for v in study.variants:
        if v.values("val_loss"):
            tried.setdefault(v.without(RATE).levels, []).append(v)
    best = [min(same, key=lambda v: v.mean("val_loss") or 0.0) for same in tried.values()]
    whole = next((v for v in best if v.factors.get("tune") == "full"), None)
    start = whole.mean("start_val_loss") if whole else None
    if whole is None or start is None:
        return []
    return [m for v in best if (m := Method(v, shares(v, whole, start))).shares]


def shares(v: Variant, whole: Variant, start: float) -> list[float]:
    """What a variant gains over the parent's loss, as a share of full finetuning's gain, by seed."""
    found = []
    for seed, run in v.seeds.items():
        full = whole.seeds.get(seed)
        mine, theirs = run.get("val_loss"), full.get("val_loss") if full else None
        if mine is None or theirs is None:
            continue
        if math.isfinite(mine) and theirs < start:
            found.append((start - mine) / (start - theirs))
    return found


def table(study: Study) -> Rows:
    """A row for each way of finetuning."""
    rows = table_of(
        {
            "finetuning": m.label,
            "trained parameters": number(m.trained, ",.0f"),
            "share of the gain": with_interval(*m.share, "{:.0%}".format),
            "validation loss": number(m.best.mean("val_loss"), ".4f"),
            "best learning rate": number(m.best.factors.get(RATE), "g"),
            "step ms": number(m.best.median("step_ms"), ",.1f"),
            "peak MiB": number(m.best.median("peak_train_bytes"), ",.1f", 2**-20),
            "optimizer KiB": number(m.best.median("optimizer_bytes"), ",.0f", 2**-10),
        }
        for m in methods(study)
    )
    return without_empty(rows)


def figure(study: Study, styles: Styles) -> Drawing | None:
    """The share of full finetuning's gain against trained parameters."""
    found = methods(study)
    if not found:
        return None
    drawing, axes = style.canvas(1, height=4.2)
    for m in found:
        look = styles[m.best].plot | {"linestyle": "", "markersize": 7, "label": m.label}
        whiskers = style.whiskers(*m.share, 100)
        axes.errorbar(m.trained, 100 * m.share[0], yerr=whiskers, capsize=3, **look)
    axes.axhline(100, color=style.INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set(xlabel="trained parameters", ylabel="share of full finetuning's gain, %")
    style.legend(axes, len(found))
    return drawing, (
        "Gain in validation loss over the parent, as a share of full finetuning's, against the number of "
        "trained parameters. Each method at the best of the learning rates tried for it. Whiskers: 95 % "
        "intervals over seeds."
    )
