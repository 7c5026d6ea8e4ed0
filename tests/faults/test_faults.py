"""Kills, damage and hostile input in small numbers; tests/faults/campaign.py runs hundreds of each."""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from damage import altered, cuts, flips
from fuzz import configs, files
from hostile import GADGETS, gadgets, opening, pickles, seal
from kills import (
    Scene,
    Tally,
    crashes,
    damage,
    ended,
    forked,
    losses_of,
    random_kills,
    scene,
    unfinished,
    unlike,
    writes_of_a_save,
)
from tiny import HANG, Documents, corpus, eventually

from cli.evaluate import evaluate
from data.atomic import read_json, verify
from train.config.compose import compose
from train.config.keys import FIXED_ON_RESUME
from train.record import checkpoint
from train.record.checkpoint import find
from train.run import refuse_changes, run_training
from train.setup.run_setup import check
from train.trainer import Trainer

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def here() -> Iterator[Scene]:
    """An undisturbed run, and a folder for others like it."""
    with scene() as made:
        yield made


def fine(tally: Tally) -> None:
    """No faults in at least one trial."""
    assert tally.trials
    assert not tally.faults, "\n".join(tally.faults)


# Kills


def test_killed_at_random_moments_a_run_loses_nothing(here: Scene) -> None:
    fine(random_kills(here, 4, seed=1))


def test_wherever_a_save_dies_a_checkpoint_is_whole(here: Scene) -> None:
    fine(crashes(here, every=9))


def test_a_save_is_on_disk_before_it_is_seen(here: Scene) -> None:
    trace = writes_of_a_save(here)
    new, old = "step_000009", "step_000003"
    (rename,) = [
        at for at, entry in enumerate(trace) if entry[0] == "rename" and f".tmp-{new}" in entry[1]
    ]
    written = {path for call, path in trace[:rename] if call == "write" and new in path}
    synced = [path for call, path in trace[:rename] if call == "fsync"]
    assert {Path(path).name for path in written} == {
        "model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.json"
    }  # fmt: skip
    assert written < set(synced)
    assert Path(synced[-1]).name.endswith(new)  # the folder, after all that it holds
    assert synced[0].endswith("metrics.jsonl")  # no checkpoint is ahead of its records
    after = [(call, Path(path).name) for call, path in trace[rename + 1 :]]
    assert after[0] == ("fsync", "checkpoints")
    gone = [at for at, (call, path) in enumerate(trace) if old in path]
    assert min(gone) > rename
    assert trace[gone[0]][0] == "rename"  # aside, before anything in it is deleted


def test_a_second_interrupt_leaves_at_once(
    here: Scene, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The first one waits for the end of a step, which here outlasts the second."""
    out = here.folder / "twice"
    begun, noted, sent = (tmp_path / mark for mark in ("begun", "noted", "sent"))
    real = Trainer.train_step

    def long(trainer: Trainer, warm: bool) -> None:
        if trainer.step == 7:
            begun.touch()
            eventually(lambda: trainer.received_signal)
            noted.touch()
            eventually(sent.exists)
        real(trainer, warm)

    monkeypatch.setattr(Trainer, "train_step", long)
    process = forked(here, out)
    for mark in (begun, noted):
        assert ended(process, HANG, until=mark.exists) is None
        assert mark.exists()
        os.kill(process, signal.SIGINT)
    sent.touch()
    assert ended(process, HANG) == -signal.SIGINT
    found, problems = find(out)
    assert found is not None
    assert (found.step, problems) == (6, [])
    monkeypatch.undo()
    assert not unlike(here, out, ended(forked(here, out), HANG))


# Storage


def test_a_save_that_does_not_fit_says_what_it_needs(
    here: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = here.folder / "full"
    real, size = checkpoint.save, 10_000

    def save(run: Path, step: int, *state: Any) -> None:
        if step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        real(run, step, *state)

    monkeypatch.setattr(checkpoint, "save", save)
    assert ended(forked(here, out), HANG) == 3
    status = read_json(out / "status.json")
    assert status["state"] == "failed"
    for part in ("step_000009", "File too large", "needs about", "bytes, ", "are free"):
        assert part in status["reason"]
    assert not unfinished(out)
    assert not damage(here, out)
    found, _ = find(out)
    assert found is not None
    assert found.step == 6
    monkeypatch.undo()
    assert not unlike(here, out, ended(forked(here, out), HANG))


def test_flipped_bits_and_cut_files_are_noticed_and_named(here: Scene) -> None:
    fine(flips(here, 150, seed=1))
    fine(cuts(here, 50, seed=1))


def test_resuming_falls_back_to_an_earlier_checkpoint_and_says_so(
    here: Scene, capfd: pytest.CaptureFixture[str]
) -> None:
    out = here.folder / "fallen"
    shutil.copytree(here.folder / "whole", out)
    (out / "summary.json").unlink()
    newest = max((out / "checkpoints").glob("step_*"))
    weights = newest / "model.safetensors"
    with altered(weights, weights.read_bytes()[:-1]):
        assert run_training(here.config(out)) == 0
    said = capfd.readouterr().err
    assert f"{weights} is damaged" in said
    assert "falling back to an earlier checkpoint" in said
    assert losses_of(out) == here.losses


def build(cache: str) -> list[int]:
    return (
        corpus(Documents("some text, and more " * 30_000), Path(cache), tokenizer="bpe")
        .train[:50]
        .tolist()
    )


def build_and_die(cache: str) -> None:
    """Killed with everything written and nothing in its place."""
    with patch("data.atomic.sha256", lambda path: os.kill(os.getpid(), signal.SIGKILL)):
        build(cache)


def test_of_four_that_build_one_cache_one_may_die(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    targets = [build_and_die, build, build, build]
    builders = [context.Process(target=target, args=[str(tmp_path)]) for target in targets]
    builders[0].start()
    builders[0].join(HANG)
    assert list(tmp_path.glob(".tmp-*"))
    for builder in builders[1:]:
        builder.start()
    for builder in builders[1:]:
        builder.join(HANG)
    assert [builder.exitcode for builder in builders] == [-signal.SIGKILL, 0, 0, 0]
    (made,) = tmp_path.glob("*/tokens.bin")
    verify(made.parent)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_folder_that_cannot_be_written_is_one_line(here: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises((ValueError, OSError), match="file/run") as error:
        run_training(here.config(tmp_path / "file" / "run"))
    assert "\n" not in str(error.value)


# Strangers


def test_no_config_runs_code_that_is_not_ours(here: Scene) -> None:
    fine(gadgets(here, random.Random(0).sample(GADGETS, 3)))


def test_no_pickle_is_opened(here: Scene) -> None:
    fine(pickles(here, ["model.safetensors", "state.json", "config.json", "documents.npz"]))


def depth(config: dict[str, Any]) -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    config["sample"] = deep


HOSTILE: dict[str, Change] = {
    "layers": lambda c: c["model"].update(n_layers=10**9),
    "width": lambda c: c["model"].update(dim=2**17, n_heads=2**10),
    "context": lambda c: c["model"].update(max_len=2**40),
    "vocabulary": lambda c: c["model"].update(vocab_size=2**40),
    "escape": lambda c: c["choices"].update(attn="\x1b[31mred"),
    "newline": lambda c: c["choices"].update(pos="rope\nall is well"),
    "nul": lambda c: c["data"].update(path="a\0b"),
    "depth": depth,
    "list": lambda c: c.update(model=[1]),
    "variable": lambda c: c["data"].update(path="${oc.env:SECRET}"),
    "text": lambda c: c["model"].update(n_heads="4"),
    "nothing": lambda c: c.clear(),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_config_is_refused_in_one_line(
    kind: str, here: Scene, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SECRET", "tell-nobody")
    tally = Tally()

    def spoil(run: Path) -> None:
        config = json.loads((run / "config.json").read_text())
        HOSTILE[kind](config)
        (run / "config.json").write_text(json.dumps(config))

    opening(here, tally, kind, here.folder / "canary", spoil)
    fine(tally)
    if kind != "depth":  # of keys that evaluating does not read
        assert tally.notes == {"refused": 2}
    with pytest.raises(ValueError) if kind != "depth" else contextlib.nullcontext():
        evaluate([f"run={here.folder}/stranger/run", "threads=1"])
    shown = "".join(capfd.readouterr())
    assert "\x1b" not in shown
    assert "tell-nobody" not in shown


@pytest.mark.parametrize("content", [{"step": 24}, {"clock": 1}, [], {"losses": "no"}])
def test_a_forged_state_is_refused_in_one_line(content: Any, here: Scene) -> None:
    def spoil(run: Path) -> None:
        for folder in (run / "checkpoints").iterdir():
            (folder / "state.json").write_text(json.dumps(content))
            seal(folder)

    tally = Tally()
    opening(here, tally, "state", here.folder / "canary", spoil)
    fine(tally)
    assert tally.notes == {"refused": 2}


def test_no_secret_of_the_environment_ends_in_a_run(
    here: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "s3cr3t" * 7
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, secret)
    out = here.folder / "private"
    assert run_training(compose([*here.overrides, f"out={out}", "wandb.mode=offline"])) == 0
    assert eventually(lambda: list(out.rglob("*.wandb")))
    written = [path for path in out.rglob("*") if path.is_file()]
    assert not [path for path in written if secret.encode() in path.read_bytes()]


# Bad input


def test_random_configs_work_or_end_in_one_line() -> None:
    tally = configs(60, seed=2)
    fine(tally)
    assert min(tally.notes["valid"], tally.notes["refused"]) > 5


def test_random_files_work_or_end_in_one_line(tmp_path: Path) -> None:
    fine(files(25, seed=1, folder=tmp_path))


def test_what_cannot_fit_is_said_before_it_is_tried(here: Scene) -> None:
    huge = [*here.overrides, "model.dim=131072", "model.n_heads=1024", "model.n_layers=64"]
    with pytest.raises(ValueError, match=r"needs at least [\d,.]+ GiB of memory.*force=true"):
        check(compose(huge))
    assert check(compose([*huge, "force=true"])).settings.force


CHANGED: dict[type, Any] = {bool: None, int: 7, float: 0.123, str: "other", list: ["other"]}


def test_whatever_shapes_what_is_learned_cannot_change_on_resume(here: Scene) -> None:
    before = here.config(here.folder / "whole")
    for key, value in before.items():
        inside = value if isinstance(value, dict) else {key: value}
        for name, old in inside.items():
            new = not old if isinstance(old, bool) else CHANGED.get(type(old), "other")
            now = before | ({key: value | {name: new}} if isinstance(value, dict) else {key: new})
            free = key not in FIXED_ON_RESUME or (key, name) in {
                ("data", "cache"),
                ("choices", "experiment"),
                ("convert", "convert"),  # without init_from
            }
            if free:
                refuse_changes(before, now)
            else:
                with pytest.raises(
                    ValueError, match=rf"cannot resume: {key}.* changed from .* to .*"
                ):
                    refuse_changes(before, now)
