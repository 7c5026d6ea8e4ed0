"""Processes forked from one that has loaded what takes long: each starts a second sooner (Linux).

The one that is forked has no threads of ours and has trained nothing, so a fork of it is as good as a
new process.
"""

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import NoReturn, Self

from train.parallel.parent import PARENT, end_with_parent, with_parent

REQUEST = 2**16  # bytes, at most
LOADED = 60.0  # seconds that a first request may wait for what is loaded
ENDED = 5.0  # seconds that a server may take to end


class Server:
    """A process that forks others, as seen from the one that has it; it ends with the context."""

    def __init__(
        self, loads: Sequence[str], environment: Mapping[str, str], keeps: Sequence[int] = ()
    ) -> None:
        """Start it. Before its first fork it `loads` modules, and calls functions, `module:function`;
        its forks have these open files, under the same numbers."""
        self.requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "train.parallel.forks", str(theirs.fileno()), *loads],
                cwd=Path(__file__).resolve().parents[2],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=with_parent(environment),
                pass_fds=[theirs.fileno(), *keeps],
                start_new_session=True,
            )

    @staticmethod
    def possible() -> bool:
        """Whether this system has what it takes."""
        try:
            os.close(os.pidfd_open(os.getpid()))
        except (AttributeError, OSError):  # not Linux, or one of before 2019
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.requests.close()  # which ends it
        try:
            self.process.wait(ENDED)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Fork:
    """A forked process that calls a function, with a part of what subprocess.Popen has."""

    def __init__(
        self,
        requests: socket.socket,
        call: str,
        values: Sequence[object] = (),
        *,
        streams: Sequence[int],
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        patience: float = LOADED,
    ) -> None:
        """Have it forked, to call `module:function` with values.

        `streams` are its standard input, output and errors, `arguments` its sys.argv. Raises OSError
        if there is no server, or none that answers within the seconds of `patience`.
        """
        request = json.dumps(
            {
                "call": call,
                "values": values,
                "arguments": arguments,
                "environment": dict(environment or {}),
                "folder": str(Path.cwd()),
            }
        ).encode()
        if len(request) > REQUEST:
            raise OSError(f"a request of {len(request):,} bytes: at most {REQUEST:,}")
        self.answers, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.answers.settimeout(patience)
        self.returncode: int | None = None
        try:
            with theirs:
                socket.send_fds(requests, [request], [theirs.fileno(), *streams])
            self.pid = int(self.answers.recv(32) or 0)
            if self.pid <= 0:  # an exit code: it was killed before it could say its number
                raise ConnectionError("no process was forked, or none that lived")
        except OSError:
            self.answers.close()
            raise

    def poll(self) -> int | None:
        """The exit code, as subprocess has it; None before the end."""
        return self.wait(0.0)

    def wait(self, seconds: float | None = None) -> int | None:
        """The exit code; None if the process has not ended within so many seconds."""
        if self.returncode is None:
            self.answers.settimeout(seconds)
            with suppress(BlockingIOError, TimeoutError):
                # No code: the server died first, at which a run is told to end.
                self.returncode = int(self.answers.recv(32) or -signal.SIGTERM)
                self.answers.close()
        return self.returncode

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)


def serve(requests: socket.socket, loads: Sequence[str]) -> None:
    """Fork a process for each request, as long as there is somebody to ask.

    Each says its number itself, and keeps the socket for answers open; its exit code is said here.
    """
    os.environ[PARENT] = str(os.getpid())
    running: dict[int, tuple[int, socket.socket]] = {}  # by the files that say that they have ended
    while True:
        for ready in select.select([requests.fileno(), *running], [], [])[0]:
            if ready in running:
                pid, answers = running.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with answers, suppress(OSError):  # of whoever asked, and has ended
                    answers.send(str(code).encode())
                continue
            request, files, _, _ = socket.recv_fds(requests, REQUEST, 4)
            if not request:
                return
            load(loads)
            loads = ()
            answers, *streams = socket.socket(fileno=files[0]), *files[1:]
            try:
                pid = os.fork()
            except OSError:
                pid = -1  # no memory for it, or too many processes, as whoever asked will see
            if not pid:
                requests.close()
                for file, (_, others) in running.items():
                    os.close(file)
                    others.close()
                become(answers, streams, **json.loads(request))
            for stream in streams:
                os.close(stream)
            if pid < 0:
                answers.close()
            else:
                running[os.pidfd_open(pid)] = pid, answers


def load(names: Sequence[str]) -> None:
    """Import modules and call functions; what fails, fails again in the fork that needs it."""
    for name in names:
        with suppress(Exception):
            if callable(found := resolve_name(name)):
                found()
    if names:
        gc.freeze()  # in a fork, a collection would copy all that it looks at


def become(
    answers: socket.socket,
    streams: Sequence[int],
    *,
    call: str,
    values: list[object],
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
) -> NoReturn:
    """Be a process of one's own, in a session of its own, that calls a function and ends."""
    code: object = 1
    try:
        answers.send(str(os.getpid()).encode())
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.chdir(folder)
        os.environ.update(environment)
        sys.argv = arguments
        resolve_name(call)(*values)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:  # noqa: BLE001  as Python does at its end
        traceback.print_exc()
    finally:
        for output in (sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk
                output.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    end_with_parent()
    with socket.socket(fileno=int(sys.argv[1])) as asked:
        serve(asked, sys.argv[2:])
