"""The properties of every attention with every position scheme, checked on this machine."""

import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from compare.check.properties import PROPERTIES, TINY, VOCAB, Broken, Variant, real_compiler
from train.config.compose import compose
from train.measure import device as devices
from train.record.terminal import columns, tracked
from train.setup.build import build_model


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
