"""Work of a sweep that may start CUDA, in a process of its own: its memory is for the runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from train.parallel.parent import workers


@contextmanager
def apart(gpus: bool) -> Iterator[Callable[..., Any]]:
    """What calls a function in another process, that ends with the context; here if there are no GPUs.

    Checking a run asks a GPU what it can, and timing its steps uses it. A process that has done so
    keeps some of the GPU's memory, or all of a GPU that takes one process alone, until it ends.
    """
    if not gpus:
        yield lambda function, *values, **named: function(*values, **named)
        return
    with workers() as process:
        yield lambda function, *values, **named: process.submit(function, *values, **named).result()
