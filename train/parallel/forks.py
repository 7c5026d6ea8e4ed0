"""Processes forked from one that has imported what takes long: each starts a second sooner (Linux).

The one that is forked has computed nothing, so a fork of it is as good as a new process.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import NoReturn, Self

from train.parallel.parent import PARENT, end_with_parent

POSSIBLE = sys.platform == "linux"
REQUEST = 2**16  # bytes, at most
POLL = 0.05  # seconds between looks at what has ended


class Server:
    """A process that forks others, as seen from the one that has it; it ends with the context."""

    def __init__(
        self, loads: Sequence[str], environment: Mapping[str, str], keeps: Sequence[int] = ()
    ) -> None:
        """Start it. It `loads` modules, and calls functions, named `module:function`; its forks keep
        these open files."""
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train.parallel.forks", str(theirs.fileno()), *loads],
                cwd=Path(__file__).resolve().parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, PARENT: str(os.getpid()), **environment},
                pass_fds=[theirs.fileno(), *keeps],
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()  # which ends it
        self.process.wait()


class Fork:
    """A forked process that calls a function, with the part of subprocess.Popen that we need."""

    def __init__(
        self,
        requests: socket.socket,
        call: str,
        values: Sequence[object] = (),
        *,
        streams: Sequence[int],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Have it forked, to call `module:function` with values.

        `streams` are its standard input, output and errors, `arguments` its sys.argv.

        Raises OSError if there is no server.
        """
        self.answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            request = {
                "call": call,
                "values": values,
                "arguments": arguments,
                "environment": dict(environment or {}),
                "folder": str(Path.cwd()),
            }
            socket.send_fds(requests, [json.dumps(request).encode()], [theirs.fileno(), *streams])
        said = self.answers.recv(32)
        if not said:
            raise ConnectionError("no process was forked: the server has ended")
        self.pid = int(said)
        self.returncode: int | None = None
        self.answers.setblocking(False)

    def poll(self) -> int | None:
        """The exit code, as subprocess has it; None before the end."""
        if self.returncode is None:
            with suppress(BlockingIOError):
                said = self.answers.recv(32)
                if said:
                    self.returncode = int(said)
                elif not exists(self.pid):  # its end was the server's
                    self.returncode = -signal.SIGTERM
        return self.returncode

    def wait(self) -> int:
        """The exit code, at the end."""
        while (code := self.poll()) is None:
            time.sleep(POLL)
        return code

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def exists(pid: int) -> bool:
    """Whether there is such a process."""
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def serve(requests: socket.socket, loads: Sequence[str]) -> None:
    """Load, then fork a process for each request, as long as there is somebody to ask.

    Each is answered by the process's number, and at its end by its exit code.
    """
    for name in loads:
        if callable(found := resolve_name(name)):
            found()
    gc.freeze()  # in a fork, a collection would copy all that it looks at
    children, woken = socket.socketpair()
    for end in (children, woken):
        end.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(woken.fileno())  # no polling: runs want the processor
    answers: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([requests, children], [], [])
        if requests in ready:
            words, files, _, _ = socket.recv_fds(requests, REQUEST, 4)
            if not words:
                return
            server, answer = os.getpid(), socket.socket(fileno=files[0])
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for each in (requests, answer, children, woken, *answers.values()):
                    each.close()
                os.environ[PARENT] = str(server)
                become(streams=files[1:], **json.loads(words))
            for stream in files[1:]:
                os.close(stream)
            answers[pid] = answer
            answer.send(str(pid).encode())
        if children in ready:
            children.recv(REQUEST)
        for pid in [*answers]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                with answers.pop(pid) as answer:
                    answer.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(
    *,
    call: str,
    values: list[object],
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    streams: list[int],
) -> NoReturn:
    """Be a process of one's own, in a session of its own, that calls a function and ends."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = arguments
    code: object = 0
    try:
        resolve_name(call)(*values)
    except SystemExit as end:
        code = end.code
    except BaseException:  # noqa: BLE001  as Python does at its end
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    end_with_parent()
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        serve(asked, sys.argv[2:])
