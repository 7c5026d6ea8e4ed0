"""Untrusted runs: names that point to code, and pickles in place of data. None may be executed."""

import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from fuzz import judge
from kills import STEPS, Scene, Tally, silent

from cli.evaluate import evaluate
from data.atomic import MANIFEST, sha256
from train.config.compose import compose
from train.run import run_training
from train.setup.run_setup import check

GADGETS = (
    "os.system subprocess.run subprocess.Popen builtins.eval builtins.exec builtins.open builtins.__import__ pickle.loads "
    "pickle.load torch.load torch.hub.load numpy.load pathlib.Path.write_text shutil.rmtree runpy.run_path "
    "importlib.import_module train.record.subprocess.run train.build.importlib.import_module "
    "model.attention.grouped.torch.hub.load data.source.Path model.attention.attend.torch.load train.sweep.processes.os.system"
).split()
#: Files of a run, and of the token cache.
PICKLED = (
    "model.safetensors optimizer.safetensors state.json MANIFEST.json config.json environment.json "
    "tokenizer.json tokens.bin documents.npz meta.json"
).split()


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def gadgets(scene: Scene, targets: Sequence[str] = GADGETS) -> Tally:
    """Name foreign code as every part of a config: on the command line and in a run."""
    tally, canary = Tally(), scene.folder / "canary"
    for target in targets:
        for group in ("attn", "pos", "data", "objective", "tune", "optim"):
            override = f"{group}._target_={target}"
            attempt(
                tally, override, canary, lambda o=override: check(compose([*scene.overrides, o]))
            )

            def spoil(run: Path, group: str = group, target: str = target) -> None:
                config = json.loads((run / "config.json").read_text())
                config[group] |= {"_target_": target, "path": str(canary), "name": str(canary)}
                (run / "config.json").write_text(json.dumps(config))

            opening(scene, tally, f"run with {override}", canary, spoil)
    return tally


def pickles(scene: Scene, names: Sequence[str] = PICKLED) -> Tally:
    """Replace each file by a pickle, with matching manifests; open the run and resume it."""
    tally, canary = Tally(), scene.folder / "canary"
    with pytest.raises(FileNotFoundError):
        canary.rmdir()
    pickle.loads(pickle.dumps(Payload(canary)))
    canary.rmdir()  # so it works
    for name in names:

        def spoil(run: Path, name: str = name) -> None:
            found = [*run.rglob(name), *(run.parent / "cache").rglob(name)]
            assert found
            for path in found:
                path.write_bytes(pickle.dumps(Payload(canary)))
                if (path.parent / MANIFEST).exists() and name != MANIFEST:
                    seal(path.parent)

        opening(scene, tally, f"pickle as {name}", canary, spoil)
    return tally


def seal(folder: Path) -> None:
    """Forge a manifest to match the files."""
    names = sorted(p.name for p in folder.iterdir() if p.name != MANIFEST)
    (folder / MANIFEST).write_text(json.dumps({name: sha256(folder / name) for name in names}))


def opening(
    scene: Scene, tally: Tally, name: str, canary: Path, spoil: Callable[[Path], object]
) -> None:
    """Change a copy of the undisturbed run and its cache; then evaluate the run and resume it."""
    folder = scene.folder / "stranger"
    shutil.rmtree(folder, ignore_errors=True)
    run = folder / "run"
    shutil.copytree(scene.folder / "whole", run)
    shutil.copytree(scene.folder / "cache", folder / "cache")
    spoil(run)
    more = [*scene.overrides, f"data.cache={folder}/cache", f"out={run}", "resume=true"]
    attempt(tally, f"{name}, evaluated", canary, lambda: evaluate([f"run={run}", "threads=1"]))
    attempt(
        tally,
        f"{name}, resumed",
        canary,
        lambda: run_training(compose([*more, f"steps={STEPS + 1}"])),
    )


def attempt(tally: Tally, name: str, canary: Path, act: Callable[[], object]) -> None:
    """Do something hostile: nothing may be executed, and refusals take one line."""
    with silent():
        judge(tally, name, act)
    if canary.exists():
        tally.faults.append(f"{name}: executed")
        canary.rmdir()
