"""Commands. The package is imported before torch, which reads how its threads wait when it loads."""

import os
import time
from pathlib import Path

#: Rounds that an OpenMP thread of torch (libgomp) spins for others before it sleeps. 300,000, its own
#: default, are 7 ms: fastest on a quiet machine, but threads of two processes on the same cores then
#: keep each other from running. 2,000 are about 50 us, as long as waking takes.
QUIET, BUSY = "300000", "2000"


def others_running() -> int:
    """Threads of other processes that run or wait for a core; 0 if not known."""
    try:
        load = Path("/proc/loadavg").read_text()  # 0.70 0.50 0.40 3/120 4711: three of 120 run
        return int(load.split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0


def is_busy() -> bool:
    """True if others have work for half of the cores for 40 ms; a quiet machine is known at once."""
    for attempt in range(5):
        if attempt:
            time.sleep(0.01)
        if 2 * others_running() < (os.cpu_count() or 1):
            return False
    return True


# The first command decides: a sweep's runs inherit it, so that their times can be compared.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = BUSY if is_busy() else QUIET
