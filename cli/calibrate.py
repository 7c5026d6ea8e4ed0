"""`python -m cli.calibrate`: false positives and power of the report's statistics."""

import sys
from pathlib import Path

from cli.entry import options_of, run_command
from compare.check.calibration import (
    FADING,
    FALSELY_KEPT,
    FOUND,
    LEAST,
    LIMIT,
    PREDICTED,
    SEEDS,
    SEEDS_TO_FIND,
    equal,
    faint,
    kept,
    ladder,
    largest_share,
    planted,
    rounds,
    worth,
)
from compare.report.runs import Run, read
from compare.statistics.paired import FEW

USAGE = """\
Calibrate the report's statistics on the runs of experiment=honesty (24 seeds, and 12 with half the
steps), with these checks:
  equal    the seeds of one variant, split at random into two groups: significant in about 5 % of splits
  planted  a variant with half the steps, 5 random seeds: always significant
  faint    one of two equal groups, shifted by two standard deviations of their differences, 5 seeds
and of seeds=auto, with differences of equal runs drawn in pairs, in up to 12 rounds' seeds:
  alarms   called better or worse although they are equal: at most 5 % and three standard errors
  shifted  worse by two standard deviations: called so in at least 95 %, after 6.5 seeds on average at most
  edge     worse by as much as the margin, a standard deviation and a half: called equal in at most as many
and of the worth in compute, simulated:
  worth    1.25 times the steps: within the interval in at least 95 %, less three standard errors
and of the judge, with losses drawn from equal runs, a tenth as many sessions of 100 candidates:
  nulls    changes that do nothing: kept in at most 1 %
and of a ladder of four sizes with 3 seeds, simulated:
  steady   no difference, and 5 % at each size: called growing or fading in at most 5 % and three standard errors
  fading   5 % of perplexity at the smallest, none at the largest: called fading in at least 80 %
  largest  the difference at the largest size: within what the smaller ones predict in at least 90 %

  python train.py experiment=honesty
  python -m cli.calibrate [DIR] [splits=1000]
"""


def main(arguments: list[str]) -> int:
    """`python -m cli.calibrate`: exit code 1 if a check fails."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0
    options = options_of([a for a in arguments if "=" in a], ["splits"])
    folders = [Path(a) for a in arguments if "=" not in a] or [Path("outputs/sweeps/honesty")]
    given = options.get("splits", "1000")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"splits={given} must be a number from 1")
    splits, runs = int(given), [run for run in read(folders) if run.done]
    by_steps: dict[int, list[Run]] = {}
    for run in runs:
        by_steps.setdefault(run.summary["steps"], []).append(run)
    most = max(by_steps, default=0)
    whole, half = by_steps.get(most, []), by_steps.get(most // 2, [])
    if len(whole) < 24:
        raise ValueError(
            f"{folders[0]}: {len(whole)} finished runs with {most} steps; 24 are needed"
        )
    checks = {
        "equal": (equal(whole, splits), LIMIT),
        "planted": (planted(whole, half, splits), 1.0),
        "faint": (faint(whole, splits), LEAST),
    }
    failed = False
    for name, (share, bound) in checks.items():
        well = share <= bound if name == "equal" else share >= bound
        failed |= not well
        sign = "at most" if name == "equal" else "at least"
        print(
            f"{name:<8} significant in {share:6.1%} of {splits} splits ({sign} {bound:.0%}){'' if well else '  FAILED'}"
        )
    alarms = rounds(whole, splits, shift=0.0, margin=0.05)  # too little to be called equal
    shifted = rounds(whole, splits, shift=2.0, margin=0.5)
    edge = rounds(whole, splits, shift=1.5, margin=1.5)
    most_wrong = largest_share(splits)
    covered = {seeds: worth(splits, seeds) for seeds in (FEW, SEEDS)}
    sessions = max(1, splits // 10)
    falsely = kept(whole, sessions)
    steady = {effect: ladder(splits, effect, effect) for effect in (0.0, FADING)}
    fading = ladder(splits, FADING, 0.0)
    wrong, found = alarms.share("better", "worse"), shifted.share("worse")
    more_checks = {
        f"alarms   called different in {wrong:6.1%} (at most {most_wrong:.1%}), after "
        f"{alarms.seeds:.1f} seeds": wrong <= most_wrong,
        f"shifted  called worse in {found:6.1%} (at least {FOUND:.0%}), after {shifted.seeds:.1f} seeds "
        f"(at most {SEEDS_TO_FIND:g})": found >= FOUND and shifted.seeds <= SEEDS_TO_FIND,
        f"edge     called equal in {edge.share('equal'):6.1%} (at most {most_wrong:.1%})": (
            edge.share("equal") <= most_wrong
        ),
        **{
            f"worth    within the interval in {share:6.1%} (at least {1 - most_wrong:.1%}), "
            f"{seeds} seeds": share >= 1 - most_wrong
            for seeds, share in covered.items()
        },
        f"nulls    kept in {falsely:6.2%} of {sessions} sessions' changes (at most {FALSELY_KEPT:.0%})": (
            falsely <= FALSELY_KEPT
        ),
        **{
            f"steady   called growing or fading in {share:6.1%} (at most {most_wrong:.1%}), a difference of "
            f"{effect:.3f} nats": share <= most_wrong
            for effect, sizes in steady.items()
            for share in [sizes.share("grows", "fades")]
        },
        f"fading   called fading in {fading.share('fades'):6.1%} (at least {LEAST:.0%})": (
            fading.share("fades") >= LEAST
        ),
        f"largest  within what is predicted in {fading.predicted:6.1%} (at least {PREDICTED:.0%})": (
            fading.predicted >= PREDICTED
        ),
    }
    for line, well in more_checks.items():
        failed |= not well
        print(f"{line}{'' if well else '  FAILED'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
