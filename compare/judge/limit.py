"""A limit on wall time: what is running is told to save and end, as by a SIGTERM."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

AGAIN = 0.5  # seconds to the next try, where there was nothing to stop


class Limit:
    """Seconds from now, and whether they are over."""

    def __init__(self, seconds: float) -> None:
        self.started = time.monotonic()
        self.seconds = seconds
        self.stopped = threading.Event()

    @property
    def used(self) -> float:
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        return max(0.0, self.seconds - self.used)


@contextmanager
def limited(seconds: float) -> Iterator[Limit]:
    """A limit that stops what takes signals meanwhile: `train.sweep.processes.launch_here` does.

    A SIGTERM that comes from elsewhere ends the process, with exit code 143.
    """
    limit, ended = Limit(seconds), threading.Event()

    def outside(number: int, _: FrameType | None) -> None:
        if not limit.stopped.is_set():
            raise SystemExit(128 + number)

    def watch() -> None:
        ended.wait(seconds)
        while not ended.is_set():
            limit.stopped.set()
            if signal.getsignal(signal.SIGTERM) is not outside:
                signal.raise_signal(signal.SIGTERM)
                return
            ended.wait(AGAIN)

    before = signal.signal(signal.SIGTERM, outside)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield limit
    finally:
        ended.set()
        thread.join()
        signal.signal(signal.SIGTERM, before)
