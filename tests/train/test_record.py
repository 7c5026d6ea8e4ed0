"""Files that the commands write."""

import io
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from tiny import HANG, RUN, eventually

from cli.evaluate import evaluate
from data.atomic import verify
from train.parallel.forks import Fork, Server
from train.record.run_log import Record, records
from train.record.wandb_process import EARLY, FORKS, WandbProcess, importing
from train.step import StepResult, TrainStep

ROOT = Path(__file__).resolve().parents[2]

SUMMARY = set(
    "attn pos model seed n_kv_heads params params_non_embedding flops_per_token steps tokens "
    "train_loss val_loss val_perplexity val_bits_per_byte val_tokens train_seconds wall_seconds "
    "warmup_seconds step_ms step_ms_iqr tokens_per_second mfu attention_ms attention_share "
    "peak_train_bytes peak_eval_bytes peak_process_bytes peak_method parameter_bytes gradient_bytes "
    "optimizer_bytes kv_cache_bytes_per_token kernel device dtype compiled threads "
    "data_fingerprint tokenizer_sha256".split()
)


def ask(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the root in this process."""
    command = [name, *map(str, arguments)]
    with (
        redirect_stdout(io.StringIO()) as out,
        redirect_stderr(io.StringIO()) as errors,
        patch.object(sys, "argv", command),
        pytest.raises(SystemExit) as end,
    ):
        runpy.run_path(str(ROOT / name), run_name="__main__")
    return subprocess.CompletedProcess(command, end.value.code, out.getvalue(), errors.getvalue())


def start(places: list[str], out: Path, *more: str) -> subprocess.Popen[str]:
    """A run in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *places, f"out={out}", *more],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, text: Path) -> list[str]:
    cache = tmp_path_factory.mktemp("cache")
    return [*RUN, f"data.path={text}", f"data.cache={cache}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, places: list[str]) -> Path:
    """A run in a process of its own, logged to wandb offline."""
    out = tmp_path_factory.mktemp("runs") / "gqa"
    process = start(places, out, "attn=gqa", "pos=rope", "steps=20", "wandb.mode=offline")
    printed, errors = process.communicate(timeout=HANG)
    assert process.returncode == 0, errors
    for words in (
        "perplexity",
        "bits per byte",
        "tokens per second",
        "KV cache",
        "sample:",
        str(out),
    ):
        assert words in printed
    assert "\x1b" not in errors + printed  # no live progress in a log file
    return out


def test_a_run_leaves_every_file_of_the_contract(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["choices"] | {"attn": "gqa", "pos": "rope"} == config["choices"]
    environment = json.loads((finished / "environment.json").read_text())
    assert {"torch", "device", "cpu", "threads", "dtype", "git_commit", "command"} <= set(
        environment
    )
    assert json.loads((finished / "status.json").read_text()) == {
        "state": "done",
        "reason": None,
        "last_step": 20,
    }
    assert (finished / "tokenizer.json").exists()
    assert (finished / "sample.txt").read_text()
    newest = finished / "checkpoints/step_000020"
    verify(newest)
    assert {p.name for p in newest.iterdir()} == {
        "MANIFEST.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    assert eventually(lambda: list((finished / "wandb").glob("offline-run-*")))


def test_the_records_are_complete(finished: Path) -> None:
    lines = list(records(finished / "metrics.jsonl"))
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == list(range(1, 21))
    assert {"loss", "tokens", "seconds", "lr", "grad_norm"} <= set(train[0])
    assert [line["tokens"] for line in train] == [64 * step for step in range(1, 21)]
    assert [line["step"] for line in lines if line["split"] == "val"] == [5, 10, 15, 20]
    seconds = [line["seconds"] for line in train]
    assert seconds == sorted(seconds)


def test_the_summary_has_every_key_and_is_consistent(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert not [key for key in SUMMARY if summary[key] is None]
    lines = list(records(finished / "metrics.jsonl"))
    train = [line["loss"] for line in lines if line["split"] == "train"]
    assert summary["train_loss"] == pytest.approx(sum(train) / 20)
    last = [line for line in lines if line["split"] == "val"][-1]
    assert summary["val_loss"] == last["loss"]
    assert summary["n_kv_heads"] == 2
    assert summary["parameter_bytes"] == 4 * summary["params"] == summary["gradient_bytes"]
    assert summary["optimizer_bytes"] == pytest.approx(8 * summary["params"], rel=0.01)
    size = 2 if summary["dtype"] == "bfloat16" else 4
    assert summary["kv_cache_bytes_per_token"] == 3 * 2 * 2 * 8 * size  # layers, k and v, heads
    assert summary["kernel"] == "matmul"
    clocks = [line["seconds"] for line in lines if line["split"] == "train"]
    assert summary["train_seconds"] + summary["warmup_seconds"] == pytest.approx(clocks[-1])
    assert summary["wall_seconds"] > summary["train_seconds"]
    assert summary["attention_share"] == pytest.approx(summary["attention_ms"] / summary["step_ms"])
    static = summary["parameter_bytes"] + summary["optimizer_bytes"]
    assert summary["peak_train_bytes"] > static + summary["gradient_bytes"]


def test_scoring_a_checkpoint_repeats_what_training_logged(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    done = ask("eval.py", f"run={finished}", "threads=1")
    assert done.returncode == 0, done.stderr
    (path,) = (finished / "eval").iterdir()
    result = json.loads(path.read_text())
    assert result["loss"] == summary["val_loss"]
    assert result["perplexity"] == summary["val_perplexity"]
    assert result["bits_per_byte"] == summary["val_bits_per_byte"]
    assert result["tokens"] == summary["val_tokens"]


def test_positions_may_be_scaled_at_evaluation_alone(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {}
    for scheme in ([], ["pos=rope_linear", "pos.factor=2"], ["pos=rope_yarn", "pos.factor=2"],
                   ["pos=rope"], ["pos=rope_linear", "pos.factor=1"]):  # fmt: skip
        assert evaluate([f"run={finished}", "context=32", *scheme]) == 0
        path = Path(capsys.readouterr().out.split("written: ")[1].strip())
        result = json.loads(path.read_text())
        found[path.name] = result["nats"]
        assert result["pos"] == (scheme[0].partition("=")[2] if scheme else "rope")
    plain, linear, yarn, same, unscaled = found.values()  # five files: none overwrites another
    assert plain == same == unscaled
    assert len({plain, linear, yarn}) == 3
    with pytest.raises(ValueError, match="position.table.weight is missing"):
        evaluate([f"run={finished}", "pos=t5"])


def test_another_scheme_at_evaluation_keeps_what_the_run_had(
    finished: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    config = json.loads((run / "config.json").read_text())
    config["pos"]["base"] = 50
    (run / "config.json").write_text(json.dumps(config))
    nats = []
    for scheme in ([], ["pos=rope_linear", "pos.factor=1"], ["pos=rope", "pos.base=10000"]):
        assert evaluate([f"run={run}", *scheme]) == 0
        path = Path(capsys.readouterr().out.split("written: ")[1].strip())
        nats.append(json.loads(path.read_text())["nats"])
    assert nats[0] == nats[1] != nats[2]


def test_a_run_writes_from_a_prompt(finished: Path) -> None:
    wanted = [f"run={finished}", "prompt=import", "max_new_tokens=20", "threads=1"]
    once, again = ask("sample.py", *wanted), ask("sample.py", *wanted)
    assert once.returncode == 0, once.stderr
    assert once.stdout.startswith("import")
    assert once.stdout == again.stdout
    two = ask("sample.py", *wanted, "seed=1", "num_samples=2")
    assert two.stdout.count("import") >= 2


def test_counting_without_training_is_quick_and_claims_nothing(
    places: list[str], tmp_path: Path
) -> None:
    done = ask("train.py", *places, "steps=0", f"out={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert summary["params"] > 0
    assert summary["kv_cache_bytes_per_token"] > 0
    for key in ("train_loss", "val_loss", "step_ms", "peak_train_bytes", "attention_ms", "mfu"):
        assert summary[key] is None


def steps_and_losses(out: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in records(out / "metrics.jsonl") if r["split"] == "train"]


def test_a_killed_and_resumed_run_repeats_the_uninterrupted_one(
    places: list[str], tmp_path: Path
) -> None:
    """At a constant learning rate, so that the killed run may be any number of steps ahead.

    In float32; test_trainer.py resumes a few steps in bfloat16.
    """
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    recipe = [*places, "model.dropout=0.1", "accumulate=2", "dtype=float32"]
    recipe += ["optim.schedule=constant", "save_every=10"]
    process = start(recipe, parts, "steps=100000")
    try:
        assert eventually(lambda: len(steps_and_losses(parts)) > 35 or process.poll() is not None)
    finally:
        process.kill()
        process.communicate()
    steps = len(steps_and_losses(parts)) + 20
    for out in (whole, parts):
        done = ask("train.py", *recipe, f"steps={steps}", f"out={out}", "resume=true")
        assert done.returncode == 0, done.stderr
    assert steps_and_losses(parts) == steps_and_losses(whole)
    assert len(steps_and_losses(parts)) == steps


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_so(
    places: list[str], tmp_path: Path, number: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TrainStep.__call__

    def interrupted(self: TrainStep, step: int) -> StepResult:
        if step == 6:  # the seventh
            os.kill(os.getpid(), number)
        return real(self, step)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    done = ask("train.py", *places, f"out={tmp_path}/run", "save_every=null")
    assert done.returncode == code, done.stderr
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["last_step"]) == ("interrupted", 7)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_000007"]
    assert "continue with resume=true" in done.stderr


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("train.py", ["attn=gqaa"], "did you mean gqa?"),
        ("train.py", ["attn=gqa", "attn.n_kv_heads=4", "model.n_heads=6"], "1, 2, 3, 6"),
        ("train.py", ["data=text", "data.path=/no/such.txt"], "no such file"),
        ("train.py", ["attn=\x1b[31m"], "attn=\\x1b[31m: no such choice"),
        ("train.py", ["data=text", "data.path={half}"], "Missing a closing quotation mark"),
        ("eval.py", ["run=/no/such/run"], "is not a run"),
        ("eval.py", [], "run has no value yet"),
        ("sample.py", ["run=/no/such/run"], "is not a run"),
        ("sample.py", ["promt=x"], "did you mean prompt?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    name: str, arguments: list[str], message: str, tmp_path: Path
) -> None:
    half = tmp_path / "half.jsonl"
    half.write_text('{"text": "whole"}\n{"text": "cut o')
    done = ask(name, *(argument.format(half=half) for argument in arguments))
    assert done.returncode == 2
    assert message in done.stderr
    assert "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


def test_questions_beyond_a_run_are_refused(
    places: list[str], finished: Path, tmp_path: Path
) -> None:
    learned = tmp_path / "learned"
    assert ask("train.py", *places, "pos=learned", "steps=2", f"out={learned}").returncode == 0
    longer = ask("eval.py", f"run={learned}", "context=17")
    assert longer.returncode == 2
    assert "context=17 exceeds the limit of pos=learned: 16 tokens" in longer.stderr
    assert ask("eval.py", f"run={finished}", "context=17").returncode == 0  # rope goes on
    unknown = ask("sample.py", f"run={finished}", "prompt=\u6f22")
    assert (unknown.returncode, "outside the vocabulary" in unknown.stderr) == (2, True)
    again = ask("train.py", *places, f"out={learned}")
    assert (again.returncode, "set resume=true to continue it" in again.stderr) == (2, True)
    for which, message in (("7", "not complete"), ("newest", "not latest, best or a step")):
        missing = ask("eval.py", f"run={finished}", f"checkpoint={which}")
        assert (missing.returncode, message in missing.stderr) == (2, True)


@pytest.mark.parametrize("name", ["train.py", "eval.py", "sample.py"])
def test_help_is_a_page_worth_reading(name: str) -> None:
    page = ask(name, "--help")
    assert page.returncode == 0
    assert page.stderr == ""
    assert page.stdout.count(f"python {name}") >= 4
    files = [ROOT / "configs" / name.replace(".py", ".yaml")]
    files += (ROOT / "configs/eval").iterdir() if name == "eval.py" else []
    for line in (line for path in files for line in path.read_text().splitlines()):
        if line and line[0].isalpha() and not line.startswith("defaults"):
            assert line in page.stdout


def test_a_cut_off_record_is_dropped_and_later_ones_with_it(tmp_path: Path) -> None:
    record = Record(tmp_path / "run")
    for step in (1, 2, 3):
        record.log({"step": step, "split": "train", "loss": 0.1 + step})
    with record.metrics.open("a") as file:
        file.write('{"step": 4, "spl')
    assert [r["step"] for r in records(record.metrics)] == [1, 2, 3]
    record.cut(2)
    assert [r["step"] for r in records(record.metrics)] == [1, 2]


def silent_server() -> socket.socket:
    """A server that accepts connections and never answers."""
    server = socket.socket()
    server.bind(("127.0.0.1", 0))
    server.listen()
    return server


def test_without_wandb_and_in_another_process_a_run_is_the_same(
    places: list[str], finished: Path, tmp_path: Path
) -> None:
    done = ask("train.py", *places, "attn=gqa", "pos=rope", "steps=20", f"out={tmp_path}/run")
    assert done.returncode == 0, done.stderr
    assert steps_and_losses(tmp_path / "run") == steps_and_losses(finished)


@pytest.mark.skipif(not Server.possible(), reason="forks take Linux")
def test_where_a_server_has_imported_wandb_the_process_is_its_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Server(["train.record.wandb_process:prepare"], {}) as server:
        monkeypatch.setenv(FORKS, str(server.requests.fileno()))
        process, stdin, stdout = importing()
        assert isinstance(process, Fork)
        stdin.close()  # the run was refused
        assert stdout.read() == b"imported\n"
        assert process.wait(HANG) == 0
        stdout.close()


@pytest.mark.parametrize(
    "trouble", ["no key", "no answer", "killed", "no wandb folder", "no import", "died early"]
)
def test_whatever_happens_to_wandb_the_run_is_the_same(
    trouble: str, places: list[str], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One warning, and the same losses as a run without wandb."""
    server = silent_server()
    real = WandbProcess.__init__
    out = tmp_path / "gqa"
    mode = "online" if trouble in ("no key", "no answer") else "offline"
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("HOME", str(tmp_path))  # where a key might be
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if trouble == "no answer":
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")

    if trouble == "no import":
        (tmp_path / "wandb.py").write_text("raise ImportError('damaged')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    if trouble != "no answer":  # which costs all of it
        monkeypatch.setattr("train.record.wandb_process.WAIT_TIMEOUT", HANG)

    def disturbed(process: WandbProcess, folder: Path) -> None:
        if trouble == "no wandb folder":
            (folder / "wandb").write_text("in the way")
        if trouble == "died early":  # while torch was imported
            EARLY[-1].process.kill()
            EARLY[-1].process.wait()
        real(process, folder)
        if trouble == "killed":
            os.killpg(process.process.pid, signal.SIGKILL)

    monkeypatch.setattr(WandbProcess, "__init__", disturbed)
    done = ask(
        "train.py", *places, "attn=gqa", "pos=rope", "steps=20", f"wandb.mode={mode}", f"out={out}"
    )
    server.close()
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if "wandb" in line]
    assert len(warned) == 1
    assert ("in the background" if trouble == "no answer" else "warning: wandb failed") in warned[0]
    assert steps_and_losses(out) == steps_and_losses(finished)
    assert json.loads((out / "status.json").read_text())["state"] == "done"
