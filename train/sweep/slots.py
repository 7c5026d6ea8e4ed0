"""Where the runs of a sweep may be: each on a GPU of its own, as far as there are some."""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from train.measure.device import JOBS_VARIABLE

VISIBLE = "CUDA_VISIBLE_DEVICES"
CORES = 2  # that a run beside others needs, for its times to be its own


@dataclass(frozen=True)
class Slot:
    """The place of one run at a time, among `jobs` of them.

    `gpu` is named as CUDA_VISIBLE_DEVICES names it, or several are; None leaves a run all that is visible. `sharing`
    is how many places share what a run computes with; 0 if that is not known.
    """

    jobs: int = 1
    sharing: int = 1
    gpu: str | None = None

    def environment(self) -> Mapping[str, str]:
        """The variables of a process in this place."""
        place = {JOBS_VARIABLE: str(self.sharing)}
        if self.gpu is not None:
            place[VISIBLE] = self.gpu
        if self.jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            # Two runs that both want all cores slow each other down many times over.
            place["OMP_NUM_THREADS"] = str(max(1, cores() // self.jobs))
        return place


def slots(jobs: int | str, gpus: list[str], each: int = 1) -> list[Slot]:
    """As many places as asked for, over the GPUs in turn; `auto`: all that there are, or one without.

    A place has as many GPUs as `each` run wants. Raises ValueError if there are not so many.
    """
    if gpus and each > len(gpus):
        raise ValueError(f"gpus={each}: this machine shows {len(gpus)}: {', '.join(gpus)}")
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    number = max(1, len(groups)) if isinstance(jobs, str) else jobs
    names = [groups[i % len(groups)] if groups else None for i in range(number)]
    on, crowded = Counter(names), number > 1 and cores() < CORES * number
    return [Slot(number, number if crowded else on[name], name) for name in names]


def visible_gpus(device: str) -> list[str]:
    """The names of the GPUs that runs on this device have; none unless it is CUDA's.

    CUDA itself is not started, which would take memory of one of them: the driver is asked.
    """
    if device not in ("auto", "cuda") or not (count := torch.cuda.device_count()):
        return []
    named = [name for name in os.environ.get(VISIBLE, "").split(",") if name]
    return named[:count] or [str(index) for index in range(count)]


def cores() -> int:
    """Processor cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
