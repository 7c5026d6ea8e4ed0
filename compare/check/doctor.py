"""The properties of every attention with every position scheme, checked on this machine."""

import os
import shutil
from collections.abc import Iterator

import torch

from compare.check.properties import (
    PROPERTIES,
    TINY,
    VOCAB,
    PropertyViolated,
    TinyVariant,
    real_compiler,
)
from train.config.compose import compose
from train.measure import device as devices
from train.parallel.parent import workers
from train.record.terminal import columns, tracked
from train.setup.build import build_model


def variant_of(cell: list[str]) -> TinyVariant:
    """The tiny variant of a command line. Raises ValueError, as PairRefused, if it makes no model."""
    config = compose([*TINY, *cell])
    device = devices.select_device(
        config["device"], config["dtype"], config["compile"], config["steps"]
    )
    with torch.device("meta"):
        build_model(config, VOCAB)
    choices = config["choices"]
    overrides = tuple(o for o in cell if o.partition("=")[0] not in ("attn", "pos"))
    return TinyVariant(choices["attn"], choices["pos"], device, overrides)


def check_all(variants: list[TinyVariant]) -> Iterator[list[str]]:
    """The failures of each variant; on a CPU, with one process per core."""
    number = min(os.cpu_count() or 1, len(variants)) if variants[0].device.name == "cpu" else 1
    with workers(number, devices.set_up_process, 1) as pool:
        results = pool.map(failures_of, variants)
        yield from tracked(results, "checking", len(variants))


def failures_of(variant: TinyVariant) -> list[str]:
    """One line per property that does not hold."""
    lines = []
    for check in PROPERTIES:
        try:
            check(variant)
        except PropertyViolated as error:
            lines.append(f"{check.__name__}: {error}")
        except Exception as error:  # noqa: BLE001 - a crash is a failure; the other checks continue
            lines.append(
                f"{check.__name__}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            )
    return lines


def matrix(failures: dict[TinyVariant, list[str]]) -> str:
    """Attention by rows, positions by columns: ok, or the number of properties that do not hold.

    A dash is a pair that was not checked.
    """
    attns = list(dict.fromkeys(v.attn for v in failures))
    positions = list(dict.fromkeys(v.pos for v in failures))
    counts: dict[tuple[str, str], int] = {}
    for variant, lines in failures.items():
        key = (variant.attn, variant.pos)
        counts[key] = counts.get(key, 0) + len(lines)
    words = {key: f"{count} FAIL" if count else "ok" for key, count in counts.items()}
    rows = [[a, *(words.get((a, p), "-") for p in positions)] for a in attns]
    return columns([["", *positions], *rows])


def compiler_fails(variant: TinyVariant) -> bool:
    """True if the real compiler fails on a variant; prints the result."""
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
