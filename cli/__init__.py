"""Commands. The package is imported before torch, which reads how its threads wait when it loads."""

import os

#: Rounds that an OpenMP thread of torch (libgomp) spins for others before it sleeps: about 50 us, as
#: long as waking takes. By default it spins for 7 ms, and two processes on the same cores then wait
#: for threads that the other's spinning keeps from running.
SPINS = "2000"

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
