"""Whether every variant does here what it must: python -m compare.doctor."""

import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from time import perf_counter

import torch

from compare.battery import PROPERTIES, TINY, VOCAB, Broken, Variant, real_compiler
from train import device as devices
from train.build import build_model
from train.cli import door
from train.config import choices_of, compose, expand, group_of
from train.progress import columns, tracked

USAGE = """\
Check every attention with every position scheme, on tiny models, on this machine's own device and
dtype, in about half a minute on 2 cores. Exit code 1 if a property does not hold.

  python -m compare.doctor [KEY=VALUE ...]      attn, pos, their keys, device and dtype; several values
                                                with commas

Examples
  python -m compare.doctor
  python -m compare.doctor attn=gqa pos=rope,alibi
  python -m compare.doctor device=cpu dtype=float32
  python -m compare.doctor attn=sliding attn.window=4
"""


def main(overrides: list[str]) -> int:
    """`python -m compare.doctor`."""
    if {"-h", "--help"} & set(overrides):
        print(USAGE)
        return 0
    groups = {override.partition("=")[0] for override in overrides}
    for key in groups:
        if group_of(key) not in ("attn", "pos", "device", "dtype"):
            raise ValueError(f"{key}: the doctor takes attn, pos, their keys, device and dtype")
    every = [f"{g}={','.join(choices_of(g))}" for g in ("attn", "pos") if g not in groups]
    variants = [variant_of(cell) for cell in expand([*every, *overrides])]
    start = perf_counter()
    print(
        f"{len(variants)} variants on {variants[0].device.name} in {variants[0].device.dtype_name}"
    )
    for holds in PROPERTIES:
        print(f"  {holds.__name__:<14} {(holds.__doc__ or '').splitlines()[0]}")
    failures = dict(zip(variants, check_all(variants), strict=True))
    print(f"\n{matrix(failures)}\n")
    for variant, lines in failures.items():
        for line in lines:
            print(f"attn={variant.attn} pos={variant.pos} {line}")
    failed = sum(map(bool, failures.values())) + compiler_fails(variants[0])
    checks = len(variants) * len(PROPERTIES)
    print(f"{checks} checks in {perf_counter() - start:.0f} s: {failed or 'no'} variants fail")
    return 1 if failed else 0


def variant_of(cell: list[str]) -> Variant:
    """The tiny variant of a command line. Raises ValueError if it makes no model."""
    config = compose([*TINY, *cell])
    device = devices.pick(config["device"], config["dtype"], config["compile"], config["steps"])
    with torch.device("meta"):
        build_model(config, VOCAB)
    choices = config["choices"]
    further = tuple(o for o in cell if o.partition("=")[0] not in ("attn", "pos"))
    return Variant(choices["attn"], choices["pos"], device, further)


def check_all(variants: list[Variant]) -> Iterator[list[str]]:
    """The failures of each variant; on a CPU, a process for each core."""
    workers = min(os.cpu_count() or 1, len(variants)) if variants[0].device.name == "cpu" else 1
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, devices.set_up, (1,)) as pool:
        results = pool.map(failures_of, variants)
        yield from tracked(results, "checking", len(variants))


def failures_of(variant: Variant) -> list[str]:
    """A line for each property that does not hold."""
    lines = []
    for holds in PROPERTIES:
        try:
            holds(variant)
        except Broken as error:
            lines.append(f"{holds.__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - a crash is a failure; the others go on
            lines.append(
                f"{holds.__name__}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            )
    return lines


def matrix(failures: dict[Variant, list[str]]) -> str:
    """Attention down, positions across: ok, or how many properties do not hold."""
    attns = list(dict.fromkeys(v.attn for v in failures))
    poss = list(dict.fromkeys(v.pos for v in failures))
    found: dict[tuple[str, str], int] = {}
    for variant, lines in failures.items():
        key = (variant.attn, variant.pos)
        found[key] = found.get(key, 0) + len(lines)
    rows = [[a, *(f"{found[a, p]} FAIL" if found[a, p] else "ok" for p in poss)] for a in attns]
    return columns([["", *poss], *rows])


def compiler_fails(variant: Variant) -> bool:
    """Try torch.compile for real, once."""
    if not (shutil.which("g++") or shutil.which("c++")) and variant.device.name == "cpu":
        print("torch.compile: not tried, there is no C++ compiler")
        return False
    try:
        real_compiler(variant)
    except Exception as error:  # noqa: BLE001 - whatever a compiler may raise
        print(f"torch.compile: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
        return True
    finally:
        torch.compiler.reset()
    print(f"torch.compile: ok (attn={variant.attn} pos={variant.pos})")
    return False


if __name__ == "__main__":
    sys.exit(door(main, sys.argv[1:]))
