"""`python -m cli.doctor`: check every variant on this machine."""

import sys
from time import perf_counter

from cli.entry import run_command
from compare.check.doctor import check_all, compiler_fails, matrix, variant_of
from compare.check.properties import PROPERTIES
from model.attention.base import PairRefused
from train.config.compose import choices_of, expand, group_of

USAGE = """\
Check the properties of every attention with every position scheme, with tiny models on this machine's
device and dtype; some minutes on 2 cores. A dash is a pair that is refused: the attention has no
use for such positions. Exit code 1 if a property does not hold.

  python -m cli.doctor [KEY=VALUE ...]      keys: attn, pos, their options, device and dtype; separate
                                            several values by commas

Examples
  python -m cli.doctor
  python -m cli.doctor attn=gqa pos=rope,alibi
  python -m cli.doctor device=cpu dtype=float32
  python -m cli.doctor attn=sliding attn.window=4
"""


def main(overrides: list[str]) -> int:
    """`python -m cli.doctor`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    groups = {override.partition("=")[0] for override in overrides}
    for key in groups:
        if group_of(key) not in ("attn", "pos", "device", "dtype"):
            raise ValueError(f"{key}: the doctor takes attn, pos, their options, device and dtype")
    every = [f"{g}={','.join(choices_of(g))}" for g in ("attn", "pos") if g not in groups]
    variants, refused = [], None
    for cell in expand([*every, *overrides]):
        try:
            variants.append(variant_of(cell))
        except PairRefused as error:
            refused = error
    if not variants:
        raise refused or ValueError(f"no variant: {' '.join(overrides)} matches no choice")
    start = perf_counter()
    print(
        f"{len(variants)} variants on {variants[0].device.name} in {variants[0].device.dtype_name}"
    )
    for check in PROPERTIES:
        print(f"  {check.__name__:<14} {(check.__doc__ or '').splitlines()[0]}")
    failures = dict(zip(variants, check_all(variants), strict=True))
    print(f"\n{matrix(failures)}\n")
    for variant, lines in failures.items():
        for line in lines:
            print(f"attn={variant.attn} pos={variant.pos} {line}")
    failed = sum(map(bool, failures.values())) + compiler_fails(variants[0])
    checks = len(variants) * len(PROPERTIES)
    print(f"{checks} checks in {perf_counter() - start:.0f} s: {failed or 'no'} variants fail")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
