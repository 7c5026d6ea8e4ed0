"""Answers to questions in a report: exact match by group, what guessing gives, what choices change."""

import functools
import re
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from compare.report import style
from compare.report.analysis import Study, family_tests, score_table
from compare.report.runs import Run
from compare.report.style import Drawing, Styles
from compare.report.tables import Rows, table_of, without_empty
from compare.report.variants import Variant
from compare.statistics.paired import Difference, mean_interval, wilson, with_interval


def groups_of(study: Study) -> list[str]:
    """The groups of questions, in order; levels of difficulty by their numbers."""
    found = dict.fromkeys(
        g for v in study.variants for a in v.answers("answers") for g in a["groups"]
    )
    if levels_of([*found]) is None:
        return [*found]
    return sorted(found, key=lambda group: int(re.split(r"\D", group)[0]))


def numbers(v: Variant, group: str, key: str) -> list[float]:
    """A number of a group of questions, for each run of a variant."""
    return [
        answer["groups"][group][key] for answer in v.answers("answers") if group in answer["groups"]
    ]


def accuracy_interval(v: Variant, group: str) -> tuple[float, float, float]:
    """Mean accuracy over runs with an interval that covers both sources of chance.

    It reaches from the lower to the higher end of Student's interval over runs and of Wilson's over
    the questions, which all runs share.
    """
    values, n = numbers(v, group, "accuracy"), int(numbers(v, group, "questions")[0])
    mean, *of_runs = mean_interval(values)
    ends = [*wilson(round(mean * n), n), *(end for end in of_runs if end is not None)]
    return mean, max(0.0, min(ends)), min(1.0, max(ends))


def share(value: float) -> str:
    """0.123 as '12.3 %'."""
    return f"{100 * value:.1f} %"


def points(value: float) -> str:
    """0.123 as '+12.3'."""
    return f"{100 * value:+.1f}"


def table(study: Study) -> Rows:
    """Per variant and group: exact match beside guessing, and how sure the model is of what it says."""
    rows = table_of(
        {
            "variant": v.label,
            "questions": group,
            "exact match": with_interval(*accuracy_interval(v, group), share),
            "runs": str(len(v.answers("answers"))),
            "of": f"{numbers(v, group, 'questions')[0]:,.0f}",
            "commonest answer": share(statistics.fmean(numbers(v, group, "baseline"))),
            "confidence": share(statistics.fmean(numbers(v, group, "confidence"))),
            "nats of the true answer": f"{statistics.fmean(numbers(v, group, 'nats_true')):.2f}",
            "only this run : only the reference": sign_tests(v),
        }
        for v in study.variants
        for group in groups_of(study)
        if numbers(v, group, "accuracy")
    )
    return without_empty(rows)


def sign_tests(v: Variant) -> str:
    """The questions that only a run or only its reference answered, with the sign test's p."""
    found = [answer["reference"] for answer in v.answers("answers") if answer.get("reference")]
    return "; ".join(f"{a['only_this']} : {a['only_the_other']}, p {a['p']:.2g}" for a in found)


def levels_of(groups: list[str]) -> tuple[list[str], str] | None:
    """The numbers and the common words of groups such as '4 pairs'; None if they are no such levels."""
    cells = [group.partition(" ") for group in groups]
    units = {words.removesuffix("s") for _, _, words in cells}
    numbered = all(re.fullmatch(r"\d+(-\d+)?", number) for number, _, _ in cells)
    if len(groups) < 2 or len(units) > 1 or not numbered:
        return None
    return [number for number, _, _ in cells], cells[-1][2]


def figure(study: Study, styles: Styles) -> Drawing | None:
    """Exact match of each variant: against the level of difficulty, or in a panel per group."""
    groups = groups_of(study)
    if not groups:
        return None
    shown = [v for v in study.variants if v.answers("answers")]
    if levels_of(groups):
        return curves(shown, groups, styles)
    return bars(shown, groups, styles)


def curves(shown: list[Variant], groups: list[str], styles: Styles) -> Drawing:
    """Exact match against the level of difficulty, a curve per variant."""
    drawing, axes = style.canvas(1, height=4.2)
    for v in shown:
        found = {place: numbers(v, group, "accuracy") for place, group in enumerate(groups)}
        for place, runs in found.items():
            axes.plot(
                [place] * len(runs), np.multiply(100, runs), ".", color=styles[v].colour, alpha=0.5
            )
        means = {place: 100 * statistics.fmean(runs) for place, runs in found.items() if runs}
        axes.plot(*zip(*means.items(), strict=True), label=v.label, linewidth=1.4, **styles[v].plot)
    guess = [
        statistics.fmean(x for v in shown for x in numbers(v, group, "baseline"))
        for group in groups
    ]
    axes.plot(np.multiply(100, guess), color=style.INK, linewidth=0.8, linestyle=":")
    label_levels(axes, groups)
    axes.set(ylabel="exact match, %", ylim=(-2, 102))
    style.legend_below(drawing, axes)
    return drawing, (
        "Share of answers that are exactly right, by difficulty: the mean over runs, and each run as a point. "
        "Dotted: the commonest answer of training, given to all."
    )


def label_levels(axes: Any, groups: list[str]) -> None:
    """Label the x axis with levels of difficulty, evenly spaced."""
    found = levels_of(groups)
    assert found is not None
    axes.set_xticks(range(len(groups)), found[0])
    axes.set_xlabel(found[1])


def bars(shown: list[Variant], groups: list[str], styles: Styles) -> Drawing:
    """Exact match of each variant as a bar with its interval, a panel per group of questions."""
    drawing, panels = style.canvas(len(groups), height=1.4 + 0.42 * len(shown))
    for axes, group in zip(np.atleast_1d(panels), groups, strict=True):
        for place, v in enumerate(reversed(shown)):
            if numbers(v, group, "accuracy"):
                bar(axes, place, v, group, styles)
        guess = statistics.fmean(x for v in shown for x in numbers(v, group, "baseline"))
        axes.axvline(100 * guess, color=style.INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(shown)), [v.label for v in reversed(shown)])
        axes.set(xlabel=f"exact match, %: {group}", xlim=(0, None))
        axes.grid(visible=False, axis="y")
    return drawing, (
        "Share of the validation questions that are answered exactly; the dot is the mean probability that the "
        "model gives to its own answers. Whiskers: 95 % intervals over runs, or over questions where those are "
        "wider. Dotted: the commonest answer of the training questions, said to all."
    )


def bar(axes: Any, place: float, v: Variant, group: str, styles: Styles) -> None:
    """A variant's exact match with its interval, and its confidence as a dot."""
    mean, low, high = (100 * x for x in accuracy_interval(v, group))
    color = styles[v].colour
    axes.barh(place, mean, height=0.6, color=color, alpha=0.6)
    whiskers = style.whiskers(mean, low, high)
    axes.errorbar(mean, place, xerr=whiskers, color=style.INK, capsize=3)
    confidence = 100 * statistics.fmean(numbers(v, group, "confidence"))
    axes.plot(confidence, place, "o", color=color, markeredgecolor=style.INK)


def score(group: str) -> Callable[[Run], float | None]:
    """The accuracy of a run in a group of questions."""

    def of_run(run: Run) -> float | None:
        groups = run.answer("answers").get("groups", {})
        return groups[group]["accuracy"] if group in groups else None

    return of_run


@functools.lru_cache(maxsize=1)  # for the verdict, the table and the figure
def differences(study: Study) -> dict[str, dict[tuple[str, str], Difference]]:
    """By group of questions: each level of a factor against the baseline's, paired by seed.

    Corrected together within a group, as the differences of quality are.
    """
    looks = study.margin is not None  # seeds came in rounds
    tables = {group: score_table(study.variants, score(group)) for group in groups_of(study)}
    return {
        group: family_tests(study.questions, scores, looks=looks)
        for group, scores in tables.items()
    }


def choice(factor: str, level: str) -> str:
    """'attn: gqa'; the name of a variant that is no level of a factor."""
    return f"{factor}: {level}" if factor else level


def in_points(d: Difference) -> tuple[float, list[list[float]] | None]:
    """A difference in exact match in percentage points, and how far its interval reaches."""
    return 100 * d.mean, style.whiskers(d.mean, d.low, d.high, 100)


def differences_table(study: Study) -> Rows:
    """What each choice changes in exact match, in percentage points."""
    against = {(c.factor, c.level): c.base for c in study.comparisons}
    return table_of(
        {
            "questions": group,
            "choice": choice(*key),
            "against": against[key],
            "points": with_interval(d.mean, d.low, d.high, points),
            "seeds": str(d.n),
            "significant": d.significance,
        }
        for group, found in differences(study).items()
        for key, d in found.items()
    )


def differences_figure(study: Study, styles: Styles) -> Drawing | None:
    """What each choice changes in exact match, a panel per group of questions."""
    found = {group: tests for group, tests in differences(study).items() if tests}
    if not found:
        return None
    if levels_of([*found]):
        return difference_curves(found)
    rows = max(map(len, found.values()))
    drawing, panels = style.canvas(len(found), height=1.4 + 0.42 * rows)
    for axes, (group, tests) in zip(np.atleast_1d(panels), found.items(), strict=True):
        for place, d in enumerate(reversed(tests.values())):
            mean, whiskers = in_points(d)
            filled = style.INK if d.significant else "none"
            axes.errorbar(
                mean,
                place,
                xerr=whiskers,
                fmt="o",
                color=style.INK,
                markerfacecolor=filled,
                capsize=3,
            )
        labels = [choice(*key) for key in reversed(tests)]
        axes.set_yticks(range(len(labels)), labels)
        axes.axvline(0, color=style.INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel=f"points of exact match: {group}", ylim=(-0.6, len(labels) - 0.4))
    return drawing, (
        "Difference in exact match from the baseline, in percentage points, paired by seed, with 95 % intervals. "
        "Filled points are significant after Holm's correction."
    )


def difference_curves(found: dict[str, dict[tuple[str, str], Difference]]) -> Drawing:
    """What each choice changes in exact match, against the level of difficulty."""
    drawing, axes = style.canvas(1, height=4.2)
    choices = list(dict.fromkeys(key for tests in found.values() for key in tests))
    for number, key in enumerate(choices):
        colour = style.COLOURS[number % len(style.COLOURS)]
        shift = 0.4 * ((number + 0.5) / len(choices) - 0.5)  # so that whiskers do not hide others
        for place, tests in enumerate(found.values()):
            if (d := tests.get(key)) is None:
                continue
            mean, whiskers = in_points(d)
            axes.errorbar(
                place + shift,
                mean,
                yerr=whiskers,
                fmt=style.MARKERS[number % len(style.MARKERS)],
                color=colour,
                markerfacecolor=colour if d.significant else "none",
                capsize=3,
                label=None if place else choice(*key),
            )
    axes.axhline(0, color=style.INK, linewidth=0.8, linestyle=":")
    label_levels(axes, [*found])
    only = f", {' '.join(choices[0]).strip()}" if len(choices) == 1 else ""
    axes.set_ylabel(f"points of exact match{only}")
    style.legend(axes, len(choices))
    return drawing, (
        "Difference in exact match from the baseline by difficulty, in percentage points, paired by seed, with 95 % "
        "intervals. Filled points are significant after Holm's correction within a level."
    )
