"""Runs wherever a Hydra launcher puts them."""

import os
import shlex
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from hydra import initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, RunMode
from omegaconf.errors import OmegaConfBaseException

from train.config.compose import quoted
from train.record.terminal import say
from train.sweep.processes import ROOT, Child, Ended, Place, folder_of, in_use, stamp_of, status_of
from train.sweep.slots import Slot

CHILD = "child"  # the key that hands a run's overrides, as one text, to another launcher's job


def elsewhere(overrides: list[str], folder: Path) -> Place:
    """What hands runs to the launcher that `hydra/launcher=NAME` names; `folder` is for its files.

    Raises ValueError if it is not installed or does not take such keys.
    """
    quiet = ["hydra/hydra_logging=none", "hydra/job_logging=none", "hydra.output_subdir=null"]
    places = [f"hydra.sweep.dir={quoted(str(folder))}", "hydra.sweep.subdir=${hydra.job.num}"]
    try:
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            config = loader.load_configuration(
                "train", [*quiet, *places, *overrides], run_mode=RunMode.MULTIRUN
            )
            context = HydraContext(config_loader=loader, callbacks=Callbacks())
            launcher = Plugins.instance().instantiate_launcher(
                hydra_context=context, task_function=child_task, config=config
            )
    except (HydraException, OmegaConfBaseException, RuntimeError, ImportError) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return partial(launch_elsewhere, launcher, folder)


def launch_elsewhere(launcher: Launcher, logs: Path, runs: list[list[str]], ended: Ended) -> None:
    """Hand runs to another launcher and wait; what becomes of each is in its folder."""
    here = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), here]))
    with following([folder_of(run) for run in runs], ended):
        try:
            launcher.launch([[f"+{CHILD}={quoted(shlex.join(run))}"] for run in runs], 0)
        except Exception as error:  # noqa: BLE001  one lost job must not hide the others
            why = " ".join(str(error).split())[:200]
            say(
                f"warning: the launcher failed: {type(error).__name__}: {why}; its logs are in {logs}"
            )


@contextmanager
def following(folders: list[Path], ended: Ended) -> Iterator[None]:
    """Meanwhile, and once more at the end, look which runs have ended since."""
    before = {folder: stamp_of(folder) for folder in folders}
    over = threading.Event()

    def look() -> None:
        last = False
        while not last:
            last = over.wait(1)
            for folder in list(before):
                status = status_of(folder)
                if status and stamp_of(folder) != before[folder] and status["state"] != "running":
                    del before[folder]
                    ended(folder)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def child_task(config: Any) -> None:
    """The work of one job under another launcher: a child, waited for. A failure is in its folder.

    A cluster's signals are passed on, and its launcher's own answer to them waits until the run has
    saved.
    """
    overrides = shlex.split(config[CHILD])
    while in_use(folder_of(overrides)):
        time.sleep(1)
    child = Child(overrides, Slot(sharing=0))
    if threading.current_thread() is threading.main_thread():
        for number in WARNINGS:
            signal.signal(number, partial(pass_on, child, signal.getsignal(number)))
    while not child.ended():
        time.sleep(0.5)


def pass_on(child: Child, before: Any, number: int, frame: FrameType | None) -> None:
    """Have a run save and end, then do what the signal did `before`."""
    child.stop()
    while not child.ended():
        time.sleep(0.1)
    if callable(before):
        before(number, frame)


#: What a cluster sends before it ends a job.
WARNINGS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
