"""The training loop: exact resume, and what must not change a run."""

import errno
import itertools
import json
import math
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from train.config.schema import Config
from train.measure.device import Device
from train.record import checkpoint
from train.record.run_folder import new_run_folder
from train.record.run_log import Record, records
from train.run import run_training
from train.setup.run_setup import assemble, check
from train.step import StepResult, TrainStep
from train.trainer import Trainer, TrainingStopped

Make = Callable[..., Config]


def losses(folder: Path, split: str = "train") -> list[tuple[int, float]]:
    lines = records(folder / "metrics.jsonl")
    return [(line["step"], line["loss"]) for line in lines if line["split"] == split]


def run(config: Config, folder: Path, code: int = 0) -> dict[str, Any]:
    config["out"] = str(folder)
    assert run_training(config) == code
    return json.loads((folder / "summary.json").read_text()) if code == 0 else {}


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the trainer right after a step, without a save."""
    real = Trainer.train_step

    def dying(self: Trainer, warm: bool) -> None:
        real(self, warm)
        if self.step == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", dying)


def stop_in_validation(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send the trainer a SIGTERM as it begins to validate after a step."""
    real = Trainer.score

    def told(self: Trainer, *args: Any, **options: Any) -> tuple[float, int]:
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **options)

    monkeypatch.setattr(Trainer, "score", told)


def test_kernels_differ_in_rounding_alone(config: Make, tmp_path: Path) -> None:
    found = {}
    for kernel in ("matmul", "flash"):
        asked = config("attn=gqa", "pos=alibi", f"kernel={kernel}", "dtype=float32", "device=cpu")
        assert run(asked, tmp_path / kernel)["kernel"] == kernel
        found[kernel] = [loss for _, loss in losses(tmp_path / kernel)]
    assert found["flash"] == pytest.approx(found["matmul"], rel=1e-6)
    assert found["flash"] != found["matmul"]  # another kernel did compute


SUMS = Path(__file__).parents[1] / "data/sums.tsv"
RECIPES = {
    "plain": [],
    "dropout": ["model.dropout=0.2"],
    "accumulation": ["accumulate=2", "model.dropout=0.1"],
    "bfloat16": ["dtype=bfloat16", "accumulate=2", "model.dropout=0.1"],
    "muon": ["optim=muon"],
    "epochs": ["data.sampling=epochs"],
    "padding": ["objective=infill", "data.tokenizer=byte"],  # documents cut to many lengths
    "infilling": [
        "objective=infill",
        "objective.text=rows",
        "objective.rate=0.5",
        "data.tokenizer=byte",
    ],
    "answers": ["objective=answers", "data=lines", f"data.path={SUMS}", "data.tokenizer=byte", "data.val_fraction=0.25"],
    "finetuning": ["objective=answers", "data=lines", f"data.path={SUMS}", "data.tokenizer=byte", "data.val_fraction=0.25",
                   "tune=dylora", "accumulate=2"],
    "latents": ["model.latents=5", "model.dropout=0.1"],
    "bottleneck": ["model.bottleneck=5", "model.dropout=0.1"],
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_resumed_run_equals_an_uninterrupted_one(
    recipe: str, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted before its first checkpoint, long after one, and right after one."""
    overrides = ["attn=gqa", "pos=rope", *RECIPES[recipe]]
    whole = run(config(*overrides), tmp_path / "whole")
    for step in (2, 7, 8):
        with monkeypatch.context() as patch:
            stop_after(patch, step)
            with pytest.raises(KeyboardInterrupt):
                run(config(*overrides, "resume=true"), tmp_path / "parts")
        assert json.loads((tmp_path / "parts/status.json").read_text())["state"] == "interrupted"
        assert len(losses(tmp_path / "parts")) == step
    parts = run(config(*overrides, "resume=true"), tmp_path / "parts")
    for split in ("train", "val"):
        assert losses(tmp_path / "parts", split) == losses(tmp_path / "whole", split)
    assert [s for s, _ in losses(tmp_path / "parts")] == list(range(1, 13))
    for key in ("train_loss", "val_loss", "val_perplexity", "steps", "tokens"):
        assert parts[key] == whole[key]


def test_the_same_seed_gives_the_same_losses_and_another_does_not(
    config: Make, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(config(f"seed={seed}", "model.dropout=0.1"), tmp_path / name)
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")


@pytest.mark.parametrize(
    "change",
    ["eval_every=1", "eval_every=null", "save_every=1", "sample.tokens=0",
     "eval_batch_size=1", "keep=1"],
)  # fmt: skip
def test_looking_at_a_run_does_not_change_it(change: str, config: Make, tmp_path: Path) -> None:
    run(config("model.dropout=0.1"), tmp_path / "a")
    run(config("model.dropout=0.1", change), tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_fewer_records_are_the_same_records(config: Make, tmp_path: Path) -> None:
    run(config(), tmp_path / "a")
    run(config("log_every=5"), tmp_path / "b")
    every = dict(losses(tmp_path / "a"))
    assert losses(tmp_path / "b") == [(step, every[step]) for step in (5, 10, 12)]


@pytest.mark.parametrize("recipe", ["plain", "padding"])
def test_accumulating_is_the_same_gradient(recipe: str, config: Make, tmp_path: Path) -> None:
    """Whatever a part has of the targets that count."""
    overrides = ["dtype=float32", *RECIPES[recipe]]
    run(config(*overrides), tmp_path / "whole")
    for parts in (2, 3, 4):  # of 4 rows: 3 parts differ
        run(config(*overrides, f"accumulate={parts}"), tmp_path / f"{parts}")
        pairs = zip(losses(tmp_path / "whole"), losses(tmp_path / f"{parts}"), strict=True)
        for (_, one), (_, other) in pairs:
            assert one == pytest.approx(other, rel=1e-5)


@pytest.mark.parametrize("pos", ["learned", "rope"])
def test_validation_scores_every_token_at_any_batch_size(
    pos: str, config: Make, tmp_path: Path
) -> None:
    summaries = [
        run(config(f"pos={pos}", f"eval_batch_size={size}"), tmp_path / str(size))
        for size in (1, 7, 64)
    ]
    tokens = len(assemble(check(config())).corpus.val)
    for summary in summaries:
        assert summary["val_tokens"] == tokens - 1
        assert summary["val_perplexity"] == pytest.approx(math.exp(summary["val_loss"]))
        assert summary["val_perplexity"] == pytest.approx(summaries[0]["val_perplexity"], rel=1e-5)


def test_without_a_validation_split_nothing_is_claimed(config: Make, tmp_path: Path) -> None:
    summary = run(config("data.val_fraction=0"), tmp_path / "a")
    assert {summary[k] for k in summary if k.startswith("val_")} == {None}
    assert summary["peak_eval_bytes"] is None
    assert summary["train_loss"] is not None


def poison_from(monkeypatch: pytest.MonkeyPatch, step: int, until: float = math.inf) -> None:
    """Make the loss of these steps infinite."""
    real, steps = TrainStep.loss, itertools.count()

    def poisoned(self: TrainStep, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return real(self, x, y) * (math.inf if step <= next(steps) < until else 1.0)

    monkeypatch.setattr(TrainStep, "loss", poisoned)


def test_a_loss_that_is_not_finite_stops_before_it_does_harm(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = assemble(check(config()))
    trainer = Trainer(job, Record(tmp_path / "run"))
    before = {n: p.clone() for n, p in job.model.named_parameters()}
    with torch.no_grad():
        job.model.embed.weight[:, 0] = math.nan
    before["embed.weight"] = job.model.embed.weight.clone()
    with pytest.raises(TrainingStopped, match="diverged at step 1: loss nan") as stop:
        trainer.train_step(warm=True)
    assert stop.value.code == 3
    for name, parameter in job.model.named_parameters():
        torch.testing.assert_close(parameter, before[name], equal_nan=True, rtol=0, atol=0)


def test_a_diverging_run_ends_with_code_3_and_keeps_its_checkpoint(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison_from(monkeypatch, 6, until=7)
    run(config(), tmp_path / "a", code=3)
    status = json.loads((tmp_path / "a/status.json").read_text())
    assert (status["state"], status["last_step"]) == ("failed", 6)
    assert "diverged at step 7: loss inf, gradient norm nan, learning rate 0.00" in status["reason"]
    dump = json.loads((tmp_path / "a/diverged.json").read_text())
    assert (dump["step"], dump["loss"], dump["grad_norm"]) == (7, "inf", "nan")
    assert dump["lr"] > 0
    assert dump["losses_before"] == [loss for _, loss in losses(tmp_path / "a")]
    assert dump["batch"] == assemble(check(config())).objective(6)[0].tolist()
    assert not (tmp_path / "a/summary.json").exists()
    assert checkpoint.find(tmp_path / "a")[0].step == 4


def test_a_full_disk_ends_with_code_3_and_keeps_the_earlier_checkpoint(
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        if "step_000008" in str(path):
            raise SafetensorError("No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    run(config(), tmp_path / "a", code=3)
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "a/checkpoints").iterdir()] == ["step_000004"]


def test_a_checkpoint_without_a_finite_loss_is_not_the_best(tmp_path: Path) -> None:
    for step, loss in ((2, 2.5), (4, 2.7), (6, math.nan)):
        folder = tmp_path / f"checkpoints/step_{step:06d}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"val_loss": loss}))
    checkpoint.prune(tmp_path, keep=1)
    assert sorted(p.name[-1] for p in (tmp_path / "checkpoints").glob("step_*")) == ["2", "6"]


def test_a_run_interrupted_while_it_validates_has_the_same_checkpoints(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of that step, saved at the signal, gets the loss of its validation."""
    asked = ["eval_every=4", "save_every=4"]
    saved = {}
    with monkeypatch.context() as patch:
        stop_in_validation(patch, 8)
        run(config(*asked), tmp_path / "parts", code=128 + signal.SIGTERM)
    assert checkpoint.find(tmp_path / "parts")[0].state["val_loss"] is None
    run(config(*asked, "resume=true"), tmp_path / "parts")
    run(config(*asked), tmp_path / "whole")
    for name in ("parts", "whole"):
        found = (tmp_path / name / "checkpoints").glob("*/state.json")
        states = map(json.loads, map(Path.read_text, found))
        saved[name] = {state["step"]: state["val_loss"] for state in states}
    assert saved["parts"] == saved["whole"]


def test_a_validation_after_a_resume_is_recorded_once(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the validation of a step that has no checkpoint but for that; then killed soon after."""
    asked = ["eval_every=4", "save_every=null"]
    with monkeypatch.context() as patch:
        stop_in_validation(patch, 4)
        run(config(*asked), tmp_path / "a", code=128 + signal.SIGTERM)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            run(config(*asked, "resume=true"), tmp_path / "a")
    run(config(*asked, "resume=true"), tmp_path / "a")
    assert [step for step, _ in losses(tmp_path / "a", "val")] == [4, 8, 12]


def test_the_newest_checkpoints_and_the_best_are_kept(config: Make, tmp_path: Path) -> None:
    run(
        config("steps=30", "optim.lr=0.3", "save_every=2", "eval_every=2", "keep=2"), tmp_path / "a"
    )
    kept = sorted(p.name for p in (tmp_path / "a/checkpoints").iterdir())
    val = dict(losses(tmp_path / "a", "val"))
    best = min(val, key=val.__getitem__)
    assert set(kept) == {"step_000028", "step_000030", f"step_{best:06d}"}
    assert checkpoint.find(tmp_path / "a", "best")[0].step == best
    assert checkpoint.find(tmp_path / "a", "28")[0].step == 28


def test_a_damaged_checkpoint_is_passed_over(config: Make, tmp_path: Path) -> None:
    run(config(), tmp_path / "a")
    newest = tmp_path / "a/checkpoints/step_000012/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 4
    newest.write_bytes(bytes(content))
    found, problems = checkpoint.find(tmp_path / "a")
    assert found.step == 8
    assert "model.safetensors is damaged" in problems[0]
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.find(tmp_path / "a", "12")


def test_a_finished_run_is_left_alone_and_may_be_extended(
    config: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(config("optim.schedule=constant"), tmp_path / "a")
    before = (tmp_path / "a/metrics.jsonl").read_bytes()
    assert run(config("optim.schedule=constant", "resume=true"), tmp_path / "a") == first
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == before
    assert "already done" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"holds a run \(done\); set resume=true to continue it"):
        run(config(), tmp_path / "a")
    longer = run(config("optim.schedule=constant", "resume=true", "steps=16"), tmp_path / "a")
    assert longer["steps"] == 16
    assert losses(tmp_path / "a")[:12] == [
        (r["step"], r["loss"])
        for r in map(json.loads, before.splitlines())
        if r["split"] == "train"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("optim.lr=0.1", "optim.lr changed from 0.003 to 0.1"),
        ("seed=1", "seed changed from 0 to 1"),
        ("pos=rope", "choices.pos changed from learned to rope"),
        ("model.dropout=0.1", "model.dropout changed from 0.0 to 0.1"),
        ("batch_size=8", "batch_size changed from 4 to 8"),
    ],
)
def test_another_config_cannot_be_resumed(
    change: str, message: str, config: Make, tmp_path: Path
) -> None:
    run(config("steps=4"), tmp_path / "a")
    with pytest.raises(ValueError, match=message):
        run(config("steps=8", change, "resume=true"), tmp_path / "a")


def test_other_text_cannot_be_resumed(config: Make, tmp_path: Path, text: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(text.read_text())
    run(config("steps=4", f"data.path={mine}"), tmp_path / "a")
    mine.write_text(text.read_text() + "changed")
    for steps in (4, 8):  # a run that is done is not taken for one of the new text, either
        with pytest.raises(ValueError, match="was trained on other text than there is now"):
            run(config(f"steps={steps}", f"data.path={mine}", "resume=true"), tmp_path / "a")
    environment = tmp_path / "a/environment.json"
    kept = json.loads(environment.read_text())
    kept.pop("source")  # as an earlier version left it
    environment.write_text(json.dumps(kept))
    with pytest.raises(ValueError, match="resume: data_fingerprint"):
        run(config("steps=8", f"data.path={mine}", "resume=true"), tmp_path / "a")


def test_a_disk_that_is_full_before_training_ends_with_code_3(
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Record, "write", full)
        run(config(), tmp_path / "a", code=3)
    assert "failed: [Errno 28] No space left on device" in capsys.readouterr().err
    monkeypatch.setattr("data.atomic.sync", full)  # the tokens cannot be kept
    run(config(f"data.cache={tmp_path}/new"), tmp_path / "b", code=3)
    assert re.search("could not write .* bytes, .* are free", capsys.readouterr().err)


def test_a_folder_in_use_is_refused(config: Make, tmp_path: Path) -> None:
    held = Record(tmp_path / "a")
    with pytest.raises(ValueError, match="in use by another process"):
        run(config(), tmp_path / "a")
    held.close()
    run(config(), tmp_path / "a")


def test_an_unfinished_save_is_swept_away(config: Make, tmp_path: Path) -> None:
    run(config("optim.schedule=constant"), tmp_path / "a")
    (tmp_path / "a/checkpoints/.tmp-step_000014").mkdir()
    run(config("optim.schedule=constant", "steps=16", "resume=true"), tmp_path / "a")
    assert not list((tmp_path / "a/checkpoints").glob(".tmp*"))


def test_a_run_cannot_be_resumed_to_a_step_that_is_past(config: Make, tmp_path: Path) -> None:
    run(config(), tmp_path / "a")
    with pytest.raises(ValueError, match="steps=8, but the run is already at step 12"):
        run(config("steps=8", "resume=true"), tmp_path / "a")


def test_a_start_that_was_killed_before_it_began_can_be_resumed(
    config: Make, tmp_path: Path
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/environment.json").write_text("{}")
    assert run(config("resume=true"), tmp_path / "a")["steps"] == 12
    (tmp_path / "b").mkdir()
    (tmp_path / "b/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        run(config("resume=true"), tmp_path / "b")


def test_starts_in_the_same_second_have_folders_of_their_own(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len({new_run_folder(config()) for _ in range(4)}) == 4


def test_bad_data_leaves_no_folder(config: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a context of 100000 needs"):
        run(config("model.max_len=100000", "pos=rope"), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_starting_from_weights_keeps_them_and_grows_a_learned_table(
    config: Make, tmp_path: Path
) -> None:
    run(config(), tmp_path / "a")
    parent = checkpoint.find(tmp_path / "a")[0].model()
    job = assemble(check(config(f"init_from={tmp_path}/a", "model.max_len=24", "seed=5")))
    table = job.model.position.table.weight
    assert table.shape == (24, 32)
    assert torch.equal(table[:16], parent["position.table.weight"])
    assert table[16:].std().item() == pytest.approx(0.02, rel=0.3)
    assert torch.equal(job.model.embed.weight, parent["embed.weight"])
    assert job.optimizer.state() == {}
    summary = run(config(f"init_from={tmp_path}/a", "model.max_len=24"), tmp_path / "b")
    assert summary["parent"] == {"run": str(tmp_path / "a"), "step": 12, "parent": None}
    (tmp_path / "a").rename(tmp_path / "moved")  # what has begun needs its parent no more
    going_on = [
        "eval_every=3",
        "optim.schedule=constant",
        f"init_from={tmp_path}/a",
        "model.max_len=24",
    ]
    with pytest.raises(ValueError, match="a is not a run"):
        run(config(*going_on), tmp_path / "d")
    (tmp_path / "moved").rename(tmp_path / "a")
    run(config(*going_on), tmp_path / "d")
    (tmp_path / "a").rename(tmp_path / "moved")
    longer = run(config(*going_on, "resume=true", "steps=14"), tmp_path / "d")
    assert (longer["steps"], longer["parent"]) == (14, summary["parent"])
    (tmp_path / "moved").rename(tmp_path / "a")
    chained = run(config(f"init_from={tmp_path}/b", "model.max_len=24"), tmp_path / "c")
    assert chained["parent"]["parent"] == summary["parent"]


def test_weights_that_do_not_fit_are_refused(config: Make, tmp_path: Path, text: Path) -> None:
    run(config(), tmp_path / "a")
    start = f"init_from={tmp_path}/a"
    with pytest.raises(ValueError, match=r"weight is \(32, 32\) there, \(64, 64\) here"):
        assemble(check(config(start, "model.dim=64")))
    with pytest.raises(ValueError, match="position.table.weight is not of this model"):
        assemble(check(config(start, "pos=rope")))
    with pytest.raises(ValueError, match="tokenizer mismatch"):
        assemble(check(config(start, "data.tokenizer=byte")))


def test_a_prefetched_batch_is_used_at_its_step_alone(config: Make) -> None:
    step = TrainStep.of_job(assemble(check(config())))
    batch = step.fetch(3)
    step.prefetched = 3, batch
    assert step.batch(3) is batch
    step.prefetched = 3, batch
    for n in (5, 3):
        for got, expected in zip(step.batch(n), step.batches(n), strict=True):
            assert torch.equal(got, expected)


MEASURED = {
    "attention_ms", "attention_share", "peak_train_bytes", "peak_eval_bytes", "matmul_flops", "mfu",
    "kv_cache_bytes_per_token",
}  # fmt: skip


@pytest.mark.parametrize("trouble", ["memory", "diverges", "no profiler", "no product", "no cache"])
def test_what_cannot_be_measured_after_training_is_null(
    trouble: str,
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run is done whether or not it can be measured, and its results are the same."""
    sound = run(config(), tmp_path / "sound")
    capsys.readouterr()

    def fail(*_: object) -> float:
        raise MemoryError("no room\nat all")

    missing = {"attention_ms", "attention_share", "peak_train_bytes"}
    if trouble == "memory":
        real = TrainStep.__call__
        refuse = lambda self, step: fail() if step == 12 else real(self, step)
        monkeypatch.setattr(TrainStep, "__call__", refuse)
    elif trouble == "diverges":
        poison_from(monkeypatch, 12)
    elif trouble == "no profiler":
        monkeypatch.setattr("train.summary.allocation_peak", fail)
        missing = {"peak_train_bytes", "peak_eval_bytes"}
    elif trouble == "no product":
        monkeypatch.setattr("train.summary.matmul_flops_per_second", fail)
        missing = {"matmul_flops", "mfu"}
    else:
        monkeypatch.setattr("train.summary.cache_bytes_per_token", fail)
        missing = {"kv_cache_bytes_per_token"}
    summary = run(config(), tmp_path / "a")
    assert {key for key in MEASURED if summary[key] is None} == missing
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert all(key in warning for key in missing - {"attention_share", "mfu"})
    assert ("NonFinite" if trouble == "diverges" else "MemoryError: no room at all") in warning
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "done"
    assert not (tmp_path / "a/diverged.json").exists()
    for key in ("train_loss", "val_loss", "steps", "tokens", "params", "optimizer_bytes"):
        assert summary[key] == sound[key]
    for name in ("model.safetensors", "optimizer.safetensors"):
        saved = [tmp_path / out / "checkpoints/step_000012" / name for out in ("a", "sound")]
        assert saved[0].read_bytes() == saved[1].read_bytes()


@pytest.mark.parametrize(
    ("where", "words", "help_"),
    [
        ("train.step.next_token_loss", "CUDA error: out of memory", "while training: reduce batch_"),
        ("train.trainer.token_nll", "CUDA out of memory. Tried to allocate 6.60 GiB", "GiB) while validating: reduce eval_batch_size"),
        ("train.run.assemble", "CUBLAS_STATUS_ALLOC_FAILED when calling", "while building the model: make"),
    ],
)  # fmt: skip
def test_a_full_device_is_one_line_that_says_what_helps(
    where: str, words: str, help_: str, config: Make, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError(words) if "Tried" in words else RuntimeError(words)

    monkeypatch.setattr(where, full)
    asked = config(f"out={tmp_path}/run")
    assert run_training(asked) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert len(said) == 1
    assert help_ in said[0]


def test_a_run_interrupted_while_it_is_measured_is_measured_when_resumed(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainStep.__call__

    def interrupted(self: TrainStep, step: int) -> StepResult:
        if step == 12:
            signal.raise_signal(signal.SIGTERM)
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", interrupted)
        run(config(), tmp_path / "a", code=128 + signal.SIGTERM)
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "interrupted"
    before = checkpoint.find(tmp_path / "a")[0].model()
    summary = run(config("resume=true"), tmp_path / "a")
    assert not [key for key in MEASURED if summary[key] is None]
    after = checkpoint.find(tmp_path / "a")[0].model()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(("every", "peak"), [("5", 105), ("null", None)])
def test_a_process_that_has_not_trained_tells_no_peak_of_training(
    every: str, peak: int | None, config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the step before its first validation, a run validates first when it is resumed."""
    at = 5 if peak else 12
    real, steps, interrupted = TrainStep.__call__, [], []

    def counted(self: TrainStep, step: int) -> StepResult:
        steps.append(step)
        if len(steps) == at and not interrupted:
            interrupted.append(step)
            signal.raise_signal(signal.SIGTERM)
        return real(self, step)

    monkeypatch.setattr(TrainStep, "__call__", counted)
    run(config(f"eval_every={every}"), tmp_path / "a", code=128 + signal.SIGTERM)
    steps.clear()
    monkeypatch.setattr("train.measure.memory.process_peak", lambda: 100 + len(steps))
    summary = run(config(f"eval_every={every}", "resume=true"), tmp_path / "a")
    assert summary["peak_process_bytes"] == peak
    assert summary["val_loss"] is not None


@pytest.mark.parametrize("trouble", ["sample", "sample.txt", "summary.json", "terminal"])
def test_a_saved_run_is_done_whatever_happens_to_its_results(
    trouble: str,
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 0, one warning, and the same summary as a run without trouble."""
    sound = run(config("model.dropout=0.1"), tmp_path / "sound")
    capsys.readouterr()

    def broken(*_: object, **__: object) -> None:
        raise OSError("no room\nat all")

    with monkeypatch.context() as patch:
        if trouble == "sample":
            patch.setattr("train.summary.generate", broken)
        elif trouble == "sample.txt":
            patch.setattr(Path, "write_text", refusing(Path.write_text, "sample.txt"))
        elif trouble == "summary.json":
            patch.setattr(Record, "write", refusing(Record.write, "summary.json"))
        else:
            patch.setattr("train.run.print_answer", broken)
        asked = config("model.dropout=0.1") | {"out": str(tmp_path / "a")}
        if trouble == "terminal":
            with pytest.raises(OSError, match="no room"):
                run_training(asked)
        else:
            assert run_training(asked) == 0
            assert "warning: no " in capsys.readouterr().err
    status = json.loads((tmp_path / "a/status.json").read_text())
    assert status == {"state": "done", "reason": None, "last_step": 12}
    assert (tmp_path / "a/summary.json").exists() == (trouble != "summary.json")
    summary = run(config("model.dropout=0.1", "resume=true"), tmp_path / "a")
    for key in ("val_loss", "train_loss", "peak_train_bytes", "kv_cache_bytes_per_token"):
        assert summary[key] == sound[key]


def refusing(real: Callable[..., Any], name: str) -> Callable[..., Any]:
    """A function that writes a file, on a disk that has no room for the one of this name."""

    def write(place: Any, *arguments: Any, **options: Any) -> Any:
        if name in (getattr(place, "name", None), *arguments):
            raise OSError(f"no room for {name}")
        return real(place, *arguments, **options)

    return write


def test_the_status_is_done_before_anything_is_measured(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that is killed while it measures leaves a run that is done."""
    seen = []

    def look(trainer: Trainer) -> dict[str, Any]:
        seen.append(json.loads((trainer.record.folder / "status.json").read_text())["state"])
        raise KeyboardInterrupt

    monkeypatch.setattr("train.run.write_results", look)
    for out, more in (("a", []), ("b", ["steps=0"])):
        with pytest.raises(KeyboardInterrupt):
            run(config(*more), tmp_path / out)
        assert json.loads((tmp_path / out / "status.json").read_text())["state"] == "done"
    assert seen == ["done", "done"]


def test_a_run_interrupted_while_it_writes_its_sample_is_interrupted(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Iterator[list[int]]:
        signal.raise_signal(signal.SIGTERM)
        yield [0]

    with monkeypatch.context() as patch:
        patch.setattr("train.summary.generate", interrupted)
        run(config(), tmp_path / "a", code=128 + signal.SIGTERM)
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "interrupted"
    run(config("resume=true"), tmp_path / "a")
    assert (tmp_path / "a/sample.txt").read_text()


def test_a_resumed_run_stays_compiled_or_not(
    config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever `auto` would come to now, on another device or for another number of steps."""
    asked: list[bool] = []
    monkeypatch.setattr(Device, "compile", lambda self, *_: asked.append(self.compiled))
    auto = ["compile=auto", "optim.schedule=constant", "resume=true"]
    assert run(config(*auto), tmp_path / "a")["compiled"] is False
    assert json.loads((tmp_path / "a/config.json").read_text())["compile"] is False
    run(config(*auto, "compile=true"), tmp_path / "b")
    assert run(config(*auto, "steps=16"), tmp_path / "b")["compiled"] is True
    assert asked == [False, True, True]


def test_a_resumed_run_keeps_its_threads(
    config: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whatever would be chosen now, so that it goes on bit for bit; unless the user names a number."""
    asked = ["optim.schedule=constant", "resume=true"]
    monkeypatch.setattr("train.measure.device.ALL_THREADS", 2)
    monkeypatch.setattr("train.run.ALL_THREADS", 2)
    try:
        assert run(config(*asked, "threads=null"), tmp_path / "a")["threads"] == 1  # a tiny model
        monkeypatch.setattr("train.measure.device.GRAIN", 0)
        assert run(config(*asked, "threads=null"), tmp_path / "b")["threads"] == 2
        longer = config(*asked, "threads=null", "steps=16")
        assert run(longer, tmp_path / "a")["threads"] == 1
        assert "threads changed" not in capsys.readouterr().err
        assert run(config(*asked, "threads=2", "steps=18"), tmp_path / "a")["threads"] == 2
        assert "resume: threads changed from 1 to 2" in capsys.readouterr().err
        monkeypatch.setattr("train.run.ALL_THREADS", 1)  # a smaller machine
        longer = config(*asked, "threads=null", "steps=20")
        assert run(longer, tmp_path / "a")["threads"] == 1
    finally:
        torch.set_num_threads(1)
