"""One run in several processes, on a GPU each: every one computes a share of a step's micro-batches.

Gradients and losses are summed, so that all take the same step. A sum of two numbers does not depend on
their order: two processes have the losses of one with `accumulate=2`, bit for bit.
"""

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.parallel.parent import with_parent

ROOT = Path(__file__).resolve().parents[2]


#: The variables that tell a process its rank, the number of all, and its rank on its machine.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SRUN = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


class Ranks:
    """The processes of a run, as one of them sees them. Alone, nothing is done and nothing costs.

    torchrun and srun name rank and size in the environment; otherwise the leader starts the others.
    """

    def __init__(self, rank: int = 0, size: int = 1, local: int = 0) -> None:
        self.rank, self.size, self.local = rank, size, local
        self.summing = True  # False: each for itself, to measure one
        self.meeting = "env://"  # where they find each other
        self.others: list[Follower] = []
        self.met = False

    @classmethod
    def given(cls) -> "Ranks | None":
        """Those that the environment names; None if it names none."""
        if not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():  # an allocation alone is no run
            return None
        for names in (TORCHRUN, SRUN):
            values = [os.environ.get(name, "") for name in names]
            if all(value.isdigit() for value in values) and int(values[1]) > 1:
                return cls(*map(int, values))
        return None

    @property
    def leader(self) -> bool:
        """True for the process that writes, prints and saves."""
        return self.rank == 0

    def start(self) -> None:
        """Start the other processes of this machine, as their leader."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address, port = free.getsockname()
        self.meeting = f"tcp://{address}:{port}"
        where = {"MASTER_ADDR": address, "MASTER_PORT": str(port), "WORLD_SIZE": str(self.size)}
        self.others = [Follower(rank, where) for rank in range(1, self.size)]

    def connect(self) -> None:
        """Meet the others; where there is CUDA, take a GPU of one's own."""
        self.met = True
        if self.size == 1:
            return
        gpus = torch.cuda.device_count()
        if gpus:
            torch.cuda.set_device(self.local % gpus)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, self.meeting, rank=self.rank, world_size=self.size)

    def share(self, parts: int) -> range:
        """This process's of so many parts, a multiple of the processes."""
        each = parts // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes, in one exchange."""
        if self.size == 1 or not self.summing:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number that the processes have, in one exchange."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return found.tolist()

    def tell(self, words: object = None) -> Any:
        """What the leader says, to all."""
        said = [words]
        if self.size > 1:
            dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]

    def end(self, *, well: bool) -> None:
        """Leave the others; where it did not end `well`, end those that were started here."""
        self.summing = False
        if self.size > 1 and dist.is_initialized() and well:
            dist.destroy_process_group()
        for other in self.others:
            other.end(wait=well)

    def dismiss(self) -> None:
        """Tell the others, if they wait still, that there is nothing to do."""
        if not self.met:
            self.connect()
            self.tell()
            self.end(well=True)

    def failure(self, seconds: float = 0.0) -> str | None:
        """Why one of the others has failed, if one has or will within so many seconds."""
        end = time.monotonic() + seconds
        while True:
            why = next((why for other in self.others if (why := other.failure())), None)
            if why or not self.others or time.monotonic() >= end:
                return why
            time.sleep(0.05)


class Follower:
    """Another process of a run, on this machine. It ends when its leader does."""

    def __init__(self, rank: int, where: Mapping[str, str]) -> None:
        self.rank = rank
        self.said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  open while the process is
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.said,
            env=with_parent({**where, **place}),
        )

    def failure(self) -> str | None:
        """The end of what it said, if it ended badly."""
        if self.process.poll() in (None, 0):
            return None
        self.said.seek(0)
        lines = self.said.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        return (
            f"process {self.rank} of the run ended with {self.process.returncode}: {last.strip()}"
        )

    def end(self, *, wait: bool) -> None:
        """Wait for its end, or bring it about."""
        try:
            self.process.wait(60 if wait else 0.1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.said.close()


def watch(
    ranks: Ranks, fail: Callable[[str], object], every: float = 0.5, patience: float = 20.0
) -> threading.Event:
    """Call `fail` with the reason, once, if one of the other processes fails and nothing notices.

    Set the event that is returned to stop watching. The exchange that a dead process leaves may never
    end, and then no exception tells.
    """
    done = threading.Event()

    def look() -> None:
        while not done.wait(every):
            why = ranks.failure()
            if why and not done.wait(patience):
                fail(why)
                return

    if ranks.others:
        threading.Thread(target=look, daemon=True).start()
    return done
