"""Sweeps: all checked first, each run apart, failures as rows, and the same end after a kill."""

import csv
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import HANG, RUN, eventually

from cli.train import train
from compare.report.write import write
from data.atomic import write_json
from train.config.compose import compose, parse, quoted
from train.config.schema import Config
from train.parallel.forks import REQUEST, Fork, Server
from train.record.run_log import records
from train.run import run_training
from train.setup.match import baseline_of, compose_matched
from train.sweep import display
from train.sweep.apart import apart
from train.sweep.display import Board, Watched
from train.sweep.expand import cells_of
from train.sweep.plan import Cell, plan_cells
from train.sweep.processes import (
    Child,
    Ended,
    folder_of,
    launch_here,
    log_of,
    reason,
    settle,
    starting,
    status_of,
)
from train.sweep.run import to_do, write_manifest
from train.sweep.slots import Slot, slots, visible_gpus
from train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]

#: A position scheme that ends its process in one way or another, or waits for a file: at its third
#: training step, or after more of them than the forecast of a sweep takes.
CRASH = """
import ctypes, os, pathlib, signal, sys, time
import torch
from model.position.base import Position

class Crash(Position):
    def __init__(self, shape, *, how: str):
        super().__init__(shape)
        self.how, self.calls = how, 0
        self.last = 3 if how in ("segfault", "exit") else 34

    def embed(self, x, pos):
        self.calls += self.training and x.requires_grad and x.device.type != "meta"
        if self.calls == self.last:
            if self.how == "segfault":
                ctypes.string_at(0)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "memory":
                torch.empty(2**55)
            if self.how == "exit":
                sys.exit(0)
            while self.how == "wait" and not pathlib.Path("go").exists():
                time.sleep(0.01)
        return x
"""
TIME_OR_MEMORY = ("seconds", "_ms", "iqr", "per_second", "mfu", "flops", "peak", "share")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project with that scheme in it."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("model", "data", "train", "compare", "cli", "configs", "train.py", "report.py"):
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        (
            shutil.copytree(source, folder / name, ignore=ignored)
            if source.is_dir()
            else shutil.copy(source, folder)
        )
    (folder / "model/position/crash.py").write_text(CRASH)
    (folder / "configs/pos/crash.yaml").write_text(
        "_target_: model.position.crash.Crash\nhow: none\n"
    )
    return folder


def begin(project: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "train.py", *arguments],
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, errors = process.communicate(timeout=HANG)
    return process.returncode, out, errors


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> list[str]:
    return [*RUN, f"data.path={text}", f"data.cache={tmp_path}/cache"]


def results(folder: Path) -> list[dict[str, str]]:
    """The rows of results.csv without what no two runs share: time and memory."""
    with (folder / "results.csv").open() as file:
        return [
            {k: v for k, v in row.items() if not any(part in k for part in TIME_OR_MEMORY)}
            for row in csv.DictReader(file)
        ]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in records(run / "metrics.jsonl") if line["split"] == "train"]


def test_failed_runs_are_rows_and_a_killed_sweep_goes_on_to_the_same_end(
    project: Path, tiny: list[str], tmp_path: Path
) -> None:
    """Four runs die in four ways; a fifth is in its 34th step when the sweep itself is killed."""
    out = tmp_path / "sweep"
    lines = "['pos=crash pos.how=memory,segfault,kill,exit seed=0','pos=crash pos.how=wait']"
    ask = [*tiny, "steps=40", "save_every=10", f"sweep={lines}", f"out={out}"]
    sweep, waiting = begin(project, *ask), out / "pos.how-wait"
    try:
        assert eventually(lambda: len(losses(waiting)) == 33)
    finally:
        sweep.kill()
        finish(sweep)
        (project / "go").touch()
    code, printed, errors = finish(begin(project, *ask))
    assert code == 1, errors
    assert "5 runs, 4 failed" in printed
    assert "4 of 5 runs need nothing more" in errors
    why = {row["run"].split("how-")[1].split("_")[0]: row["reason"] for row in results(out)}
    assert why["kill"].startswith("killed by SIGKILL")
    assert why["segfault"] == "killed by SIGSEGV"
    assert why["memory"].startswith("out of memory (allocating 144115188075855872 bytes)")
    assert why["exit"] == "SystemExit: 0"
    assert "killed by SIGSEGV" in (out / "report.html").read_text()
    assert run_training(compose([*ask[:-2], "pos=none", f"out={tmp_path}/whole/run"])) == 0
    write([tmp_path / "whole"], None)
    (whole,) = results(tmp_path / "whole")
    (parts,) = (row for row in results(out) if row["state"] == "done")
    assert parts == whole | {"run": waiting.name, "pos": "crash"}
    assert losses(waiting) == losses(tmp_path / "whole/run")


@pytest.mark.skipif(not Server.possible(), reason="forks take Linux")
def test_a_fork_is_as_a_new_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In what it says, where it is and how it ends, also if that is the end of what has forked it."""
    monkeypatch.chdir(tmp_path)
    say = "import os, signal, sys, time; print(os.getcwd(), sys.argv, os.environ['PLACE'], flush=True); "

    def fork(server: Server, program: str) -> Fork:
        with (tmp_path / "said").open("ab") as said, Path(os.devnull).open() as nothing:
            return Fork(
                server.requests, "builtins:exec", [say + program, {}],
                streams=[nothing.fileno(), said.fileno(), said.fileno()],
                arguments=["words", "more"], environment={"PLACE": "here"},
            )  # fmt: skip

    with Server([], {}) as server:
        fork(server, "open('over', 'w')").answers.close()  # whoever asked may end first
        assert eventually((tmp_path / "over").exists)
        with pytest.raises(OSError, match="bytes: at most"):
            fork(server, REQUEST * "#")
        for program, code in (
            ("", 0),
            ("sys.exit(7)", 7),
            ("sys.exit()", 0),
            ("sys.exit('a word')", 1),
            ("1 / 0", 1),
            ("os.kill(os.getpid(), 9)", -signal.SIGKILL),
            ("raise KeyboardInterrupt", 128 + signal.SIGINT),
            ("assert not sys.stdin.read() and os.getsid(0) == os.getpid()", 0),
        ):
            assert fork(server, program).wait(HANG) == code
        said = (tmp_path / "said").read_text()
        assert said.count(f"{tmp_path} ['words', 'more'] here") == 9
        assert "ZeroDivisionError" in said
        assert "\na word\n" in said
        first, second = (fork(server, "time.sleep(600)") for _ in range(2))
        assert first.poll() is None
        assert first.wait(0.01) is None
        first.terminate()
        second.kill()
        assert (first.wait(HANG), second.wait(HANG)) == (-signal.SIGTERM, -signal.SIGKILL)
        first.kill()  # nothing, as for any process that has ended
        last = fork(
            server,
            "from train.parallel.parent import end_with_parent; "
            "end = lambda *_: (time.sleep(0.5), open('saved', 'w'), sys.exit(143)); "
            "signal.signal(signal.SIGTERM, end); end_with_parent(); "
            "open('ready', 'w'); time.sleep(600)",
        )
        assert eventually((tmp_path / "ready").exists)
        server.process.kill()
        assert last.wait(HANG) == -signal.SIGTERM
        assert (tmp_path / "saved").exists()
        with pytest.raises(OSError):
            fork(server, "")


def test_runs_of_a_sweep_are_as_runs_alone_and_are_logged_to_wandb(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked, or new processes once what forks has ended: for wandb after two runs, for runs after three."""
    assert run_training(compose([*tiny, f"out={tmp_path}/alone"])) == 0
    servers, made = list[Server](), list[type]()
    begin, use = Server.__init__, Child.__init__

    def begun(server: Server, *values: Any, **named: Any) -> None:
        begin(server, *values, **named)
        servers.append(server)

    def used(child: Child, *values: Any) -> None:
        use(child, *values)
        made.append(type(child.process))

    def ended(folder: Path) -> None:
        if servers and folder.name in ("run-1", "run-2"):
            server = servers[int(folder.name[-1]) - 1]
            assert server.process.poll() is None
            server.process.kill()
            server.process.wait()

    monkeypatch.setattr(Server, "__init__", begun)
    monkeypatch.setattr(Child, "__init__", used)
    ask = [*(o for o in tiny if not o.startswith("wandb")), "wandb.mode=offline"]
    runs = [tmp_path / f"sweep/run-{n}" for n in range(4)]
    with starting(len(runs), Slot().environment()) as start:
        launch_here([[*ask, f"out={run}"] for run in runs], [Slot()], ended, start)
    forks = 3 if Server.possible() else 0
    assert made == forks * [Fork] + (4 - forks) * [subprocess.Popen]
    for number, run in enumerate(runs):
        assert status_of(run)["state"] == "done", log_of(run).read_text()
        assert "wandb failed" not in log_of(run).read_text()
        assert losses(run) == losses(tmp_path / "alone")

        def logged(run: Path = run) -> bytes:
            return b"".join(f.read_bytes() for f in run.glob("wandb/offline-run-*/*.wandb"))

        assert eventually(lambda logged=logged: b"val_perplexity" in logged())
        assert (b"train.parallel.forks" in logged()) == (number < forks - 1)  # wandb's own process


@pytest.mark.parametrize(
    ("jobs", "gpus", "cores", "expected"),
    [
        ("auto", "", 2, [(1, None)]),
        (2, "", 8, [(2, None)] * 2),
        ("auto", "0 1 2 3", 64, [(1, "0"), (1, "1"), (1, "2"), (1, "3")]),
        ("auto", "0 1 2 3", 6, [(4, "0"), (4, "1"), (4, "2"), (4, "3")]),  # they share 6 cores
        (1, "0 1", 64, [(1, "0")]),
        (3, "GPU-5e MIG-7a", 64, [(2, "GPU-5e"), (1, "MIG-7a"), (2, "GPU-5e")]),
        (2, "0", 64, [(2, "0")] * 2),
    ],
)
def test_runs_get_gpus_in_turn_and_know_how_many_share_theirs(
    jobs: int | str, gpus: str, cores: int, expected: list[tuple[int, str | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("train.sweep.slots.cores", lambda: cores)
    found = slots(jobs, gpus.split())
    assert [(slot.sharing, slot.gpu) for slot in found] == expected
    assert {slot.jobs for slot in found} == {len(expected)}


@pytest.mark.parametrize(
    ("device", "variable", "count", "expected"),
    [
        ("auto", None, 3, ["0", "1", "2"]),
        ("cuda", "2,0", 2, ["2", "0"]),
        ("auto", "GPU-5e,MIG-7a,no-such", 2, ["GPU-5e", "MIG-7a"]),
        ("auto", None, 0, []),
        ("cpu", None, 3, []),
    ],
)
def test_the_gpus_of_a_sweep_are_those_that_it_may_see(
    device: str, variable: str | None, count: int, expected: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if variable is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert visible_gpus(device) == expected


def test_runs_of_several_gpus_have_so_many_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.sweep.slots.cores", lambda: 64)
    assert [slot.gpu for slot in slots("auto", list("01234"), each=2)] == ["0,1", "2,3"]
    with pytest.raises(ValueError, match="gpus=3: this machine shows 2: 4, 7"):
        slots("auto", ["4", "7"], each=3)


def test_eight_runs_take_four_gpus_in_two_waves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run waits until the others of its wave have come, so a GPU less would never end."""
    (tmp_path / "train.py").write_text("""
import json, os, pathlib, sys, time
out = pathlib.Path(next(o for o in sys.argv if o.startswith("out="))[4:])
out.mkdir()
wave = int(out.name) // 4
(out / "gpu").write_text(os.environ["CUDA_VISIBLE_DEVICES"] + " " + os.environ["HEAD_TO_HEAD_JOBS"])
while len(list(out.parent.glob("*/gpu"))) < 4 * (wave + 1):
    time.sleep(0.01)
(out / "status.json").write_text(json.dumps({"state": "done", "reason": None, "last_step": 1}))
""")
    monkeypatch.setattr("train.sweep.processes.ROOT", tmp_path)
    monkeypatch.setattr("train.sweep.slots.cores", lambda: 64)
    runs, ended = [[f"out={tmp_path}/{n}"] for n in range(8)], list[str]()
    places = slots("auto", ["0", "1", "2", "3"])
    with starting(len(runs), places[0].environment()) as start:
        launch_here(runs, places, lambda run: ended.append(run.name), start)
    assert {status_of(tmp_path / str(n))["state"] for n in range(8)} == {"done"}
    waves = [
        [(tmp_path / str(n) / "gpu").read_text() for n in wave] for wave in (range(4), range(4, 8))
    ]
    for wave in waves:
        assert sorted(wave) == ["0 1", "1 1", "2 1", "3 1"]
    assert sorted(ended) == [str(n) for n in range(8)]


def test_what_is_done_is_skipped_and_failures_are_retried_on_request(
    in_process: None, tiny: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fit = Trainer.fit

    def fails_once(trainer: Trainer) -> None:
        if trainer.job.settings.seed == 1:
            raise MemoryError
        fit(trainer)

    ask = ["-m", *tiny, "steps=4", "seed=0,1", f"out={tmp_path}/sweep"]
    done, failed = tmp_path / "sweep/seed-0", tmp_path / "sweep/seed-1"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "fit", fails_once)
        assert train(ask) == 1
        assert [status_of(run)["state"] for run in (done, failed)] == ["done", "failed"]
        before = (done / "summary.json").stat().st_mtime_ns
        ask = [a.replace("seed=0,1", "seed=0,1,2") for a in ask]
        assert train(ask) == 1
        assert "2 of 3 runs need nothing more" in capsys.readouterr().err
    assert train([*ask, "retry=true", "jobs=2"]) == 0
    assert "their times are not comparable" in capsys.readouterr().err
    assert (done / "summary.json").stat().st_mtime_ns == before
    assert len(results(tmp_path / "sweep")) == 3
    kept = json.loads((done / "environment.json").read_text())
    (done / "environment.json").write_text(json.dumps(kept | {"source": "what the file was then"}))
    with pytest.raises(ValueError, match="seed-0 was trained on other text than there is now"):
        train(ask)


def test_what_is_not_decided_gets_more_seeds(
    in_process: None, tiny: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And the same command, started again after a round, goes on to the same end."""
    answers: list[list[str]] = []

    def undecided(folder: Path) -> list[str]:
        """Query heads that share keys are not yet told from those that do not, after the first round."""
        done = [row["run"] for row in results(folder)] if (folder / "results.csv").exists() else []
        going = [name for name in done if "mha" in name or "gqa" in name]
        answers.append(going if len(going) < 8 else [])
        return answers[-1]

    monkeypatch.setattr("cli.train.undecided", undecided)
    monkeypatch.setattr("train.sweep.run.QUIET", 0.0)
    ask = ["-m", *tiny, "steps=1", "eval_every=null", "seeds=auto", f"out={tmp_path}/sweep"]
    variants = "attn=mha,gqa,mqa"
    with monkeypatch.context() as patch:  # before the second round
        patch.setattr("cli.train.undecided", lambda folder: pytest.fail("looked"))
        with pytest.raises(pytest.fail.Exception):
            train([*ask, variants])
    assert len(list((tmp_path / "sweep").glob("attn-*"))) == 9
    assert train([*ask, variants]) == 0
    said = capsys.readouterr()
    assert "5 seeds for what is not decided: 4 runs more" in said.err
    assert "13 runs, 0 failed" in said.out
    seeds = Counter(path.name.split("_")[0] for path in (tmp_path / "sweep").glob("attn-*"))
    assert seeds == {"attn-mha": 5, "attn-gqa": 5, "attn-mqa": 3}
    with pytest.raises(ValueError, match="seeds=auto chooses the seeds, but .* has one"):
        train([*ask, variants, "seed=0,1"])
    with pytest.raises(ValueError, match="margin=0 must be above 0"):
        train([*ask, variants, "margin=0."])


def test_what_failed_in_a_later_round_is_tried_again_once(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With retry=true, as what failed in the first one."""
    ran: list[str] = []

    def launch(runs: list[list[str]], slots: list[Slot], ended: Ended, start: object) -> None:
        for run in runs:
            folder = folder_of(run)
            ran.append(folder.name)
            bad = folder.name == "attn-mqa_seed-4"
            folder.mkdir(exist_ok=True)
            state = {"state": "failed" if bad else "done", "reason": "x", "last_step": 1}
            write_json(folder / "status.json", state)
            if not bad:
                write_json(folder / "summary.json", {"steps": 1})
            ended(folder)

    monkeypatch.setattr("train.sweep.run.launch_here", launch)
    monkeypatch.setattr("cli.train.report", str)
    rounds = iter(2 * [["attn-mqa_seed-0"], ["attn-mqa_seed-0"], []])
    monkeypatch.setattr("cli.train.undecided", lambda folder: next(rounds))
    monkeypatch.setattr("compare.cost.plan.probed", lambda models: [0.01] * len(models))
    ask = ["-m", *tiny, "steps=1", "attn=mha,mqa", "seeds=auto", f"out={tmp_path}/sweep"]
    assert train(ask) == 1
    assert ran.count("attn-mqa_seed-4") == 1
    assert train([*ask, "retry=true"]) == 1
    assert ran.count("attn-mqa_seed-4") == 2


def test_auto_chooses_the_seeds_of_an_experiment_too() -> None:
    cells = cells_of(["experiment=grid", "seeds=auto"], multirun=False)
    assert len(cells) == 9
    assert not any(o.startswith("seed=") for cell in cells for o in cell)
    assert len(cells_of(["experiment=grid"], multirun=False)) == 27


def test_stages_go_on_from_each_other(
    in_process: None, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = "stages=['model.max_len=8','model.max_len=16']"
    assert train(["-m", *tiny, "steps=6", "attn=mha,mqa", stages, f"out={tmp_path}/sweep"]) == 0
    assert "4 runs, 0 failed" in capsys.readouterr().out
    for attn in ("mha", "mqa"):
        first, second = (tmp_path / f"sweep/attn-{attn}_stage-{n}" for n in (1, 2))
        parent = json.loads((second / "summary.json").read_text())["parent"]
        assert Path(parent["run"]) == first.resolve()
        assert json.loads((second / "config.json").read_text())["model"]["max_len"] == 16
    by_hand = [*tiny, "steps=6", "attn=mqa", f"init_from={first}", f"out={tmp_path}/hand"]
    assert run_training(compose(by_hand)) == 0
    assert losses(tmp_path / "hand") == losses(second) != losses(first)
    assert len(results(tmp_path / "sweep")) == 4
    page = (tmp_path / "sweep/report.md").read_text()
    assert "| mha | 2 | 6 | 16 |" in page


def test_stages_that_are_interrupted_go_on_to_the_same_end(
    in_process: None, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the first stage, and of the second after a checkpoint of it."""
    sums = Path(__file__).parents[1] / "data/sums.tsv"
    stages = "stages=['objective=infill','objective=answers']"
    text = ["data=lines", f"data.path={sums}", "data.tokenizer=byte", "data.val_fraction=0.25"]
    ask = ["-m", *tiny, *text, "model.dropout=0.1", "steps=6", "seed=0,1", stages]
    assert train([*ask, f"out={tmp_path}/whole"]) == 0
    step_of = Trainer.train_step
    for stage, step in (("infill", 3), ("answers", 5)):

        def dying(trainer: Trainer, warm: bool, stage: str = stage, step: int = step) -> None:
            step_of(trainer, warm)
            if trainer.step == step and trainer.job.spec.config["choices"]["objective"] == stage:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", dying)
            assert train([*ask, f"out={tmp_path}/parts"]) != 0
        unfinished = tmp_path / f"parts/seed-0_stage-{1 if stage == 'infill' else 2}"
        assert status_of(unfinished)["state"] == "interrupted"
    assert train([*ask, f"out={tmp_path}/parts"]) == 0
    for run in ("seed-0_stage-1", "seed-0_stage-2", "seed-1_stage-1", "seed-1_stage-2"):
        assert losses(tmp_path / "parts" / run) == losses(tmp_path / "whole" / run)
        assert len(losses(tmp_path / "parts" / run)) == 6


def test_the_first_stage_may_be_left_out_by_some(tmp_path: Path, tiny: list[str]) -> None:
    """What is it good for? Both arms are runs of one sweep."""
    stages = "stages=['optim.lr=1e-3','optim.lr=2e-3']"
    cells = cells_of([*tiny, stages, "first_stage=1,2"], multirun=True)
    planned = plan_cells(cells, compose(cells[0]), tmp_path)
    found = [(cell.stage, cell.config["optim"]["lr"], cell.parent) for cell in planned]
    first = next(cell.name for cell in planned if cell.config["optim"]["lr"] == 1e-3)
    assert set(found) == {(1, 1e-3, None), (1, 2e-3, None), (2, 2e-3, first)}
    assert len({cell.identity for cell in planned}) == 3
    for wrong in ("first_stage=3", "first_stage=0"):
        with pytest.raises(ValueError, match="is not one of the 2 stages"):
            plan_cells([[*tiny, stages, wrong]], compose([*tiny, stages, wrong]), tmp_path)


def test_a_bad_cell_stops_a_sweep_before_it_starts(tiny: list[str], tmp_path: Path) -> None:
    ask = ["-m", *tiny, f"out={tmp_path}/bad", "attn=gqa", "attn.n_kv_heads=2,3"]
    with pytest.raises(ValueError, match="n_kv_heads=3 must divide n_heads=4"):
        train(ask)
    assert not (tmp_path / "bad").exists()


def planned(*overrides: str, parent: Path) -> list[Cell]:
    cells = cells_of(list(overrides), multirun=True)
    return plan_cells(cells, compose(cells[0]), parent)


def test_seeds_come_one_after_the_other_and_names_stay(tmp_path: Path) -> None:
    """All variants with one seed before the next one, so that a slow hour hits all alike."""
    cells = planned(*RUN, "data.path=README.md", "attn=mha,mqa", "seed=0,1", parent=tmp_path)
    assert [c.name for c in cells] == [
        f"attn-{attn}_seed-{seed}" for seed in (0, 1) for attn in ("mha", "mqa")
    ]
    write_manifest(tmp_path, cells[0].config, cells, baseline="attn=mha", margin=None)
    wider = planned(
        *RUN, "data.path=README.md", "attn=mha", "steps=9,12", "seed=0", parent=tmp_path
    )
    assert [c.name for c in wider] == ["steps-9", "attn-mha_seed-0"]
    write_manifest(tmp_path, cells[0].config, wider, baseline="attn=mha", margin=None)
    (again,) = planned(*RUN, "data.path=README.md", "attn=mqa", "seed=1", parent=tmp_path)
    assert again.name == "attn-mqa_seed-1"


@pytest.mark.parametrize(
    "change",
    "wandb.mode=offline jobs=3 retry=true data.cache=x force=true convert=first eval_every=3 keep=1 "
    "save_every=5 log_every=2 eval_batch_size=8 sample.tokens=3 resume=true".split(),
)
def test_what_is_no_part_of_a_run_does_not_change_its_identity(change: str, tmp_path: Path) -> None:
    same = [*RUN, "data.path=README.md"]
    one, two = (planned(*same, *more, parent=tmp_path)[0] for more in ([], [change]))
    assert one.identity == two.identity
    assert planned(*same, "steps=13", parent=tmp_path)[0].identity != one.identity


@pytest.mark.parametrize("budget", ["params", "flops"])
def test_matched_variants_cost_what_the_baseline_costs(budget: str) -> None:
    def count(config: Config) -> float:
        from compare.check.properties import CPU
        from compare.cost.counts import cost

        counted = cost(config, 65, CPU)
        return counted.params if budget == "params" else counted.flops_per_token

    for attn in ("mqa", "mla", "gqa"):
        ask = [f"attn={attn}", "pos=rope", f"match={budget}", "baseline='attn=mha pos=learned'"]
        config = compose_matched(ask)
        base = count(compose(["attn=mha", "pos=learned"]))
        plain = count(compose([f"attn={attn}", "pos=rope"]))
        assert abs(count(config) / base - 1) < 0.01 < abs(plain / base - 1)
        assert abs(config["matched"]["leftover"]) < 0.01


def test_a_match_needs_a_baseline_of_attention_and_positions() -> None:
    with pytest.raises(ValueError, match="match=params needs a baseline"):
        compose_matched(["match=params"])
    with pytest.raises(ValueError, match="steps=3 is neither attn, pos"):
        compose_matched(["match=params", "baseline='attn=mha steps=3'"])
    with pytest.raises(ValueError, match="match=bytes: no such choice"):
        compose_matched(["match=bytes", "baseline=attn=mha"])
    assert cells_of(["attn=mqa", "match=params"], multirun=False) == [["attn=mqa", "match=params"]]
    cells = cells_of(["attn=mha,mqa", "match=params"], multirun=True)
    assert [cell[-1] for cell in cells] == ["baseline='pos=learned attn=mha'"] * 2
    assert (
        baseline_of(["attn=gqa", "attn.n_kv_heads=3", "seed=1"])
        == "pos=learned attn=gqa attn.n_kv_heads=3"
    )


def test_lines_keep_their_keys_when_only_their_group_is_chosen() -> None:
    """optim=muon does not silence optim.lr=1e-3,3e-3 of a sweep that picks no optimizer."""
    cells = cells_of(["experiment=lr", "optim=muon"], multirun=False)
    assert len({compose(cell)["optim"]["lr"] for cell in cells}) == 4
    assert {compose(cell)["choices"]["optim"] for cell in cells} == {"muon"}


def test_stages_share_one_matched_width_and_must_fit(tmp_path: Path) -> None:
    same = [*RUN, "data.path=README.md"]
    ask = ["attn=mha,mqa", "match=params", "stages=['model.max_len=8','model.max_len=64']"]
    cells = planned(*same, *ask, parent=tmp_path)
    assert len({c.config["model"]["ff_dim"] for c in cells if "mqa" in c.name}) == 1
    with pytest.raises(ValueError, match=r"stage 2: .* is \(32, 128\) there, \(32, 64\) here"):
        planned(*same, "seed=0,1", "stages=['model.ff_dim=128','model.ff_dim=64']", parent=tmp_path)


def test_what_is_the_sweeps_may_not_differ_between_its_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name is the sweep's, but its runs have a and b"):
        planned(*RUN, "data.path=README.md", "name=a,b", parent=tmp_path)
    with pytest.raises(ValueError, match="no runs"):
        cells_of(["seed=range(0)"], multirun=True)


@pytest.mark.parametrize(
    "text", ["a b", "a\\b", "a\\ b", "it's", "it\\'s", "x\\", "a,b", "", "${x}"]
)
def test_any_text_comes_back_from_its_quotes(text: str) -> None:
    (override,) = parse([f"out={quoted(text)}"])
    assert override.value() == text


def test_how_a_process_ended_in_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("step 3\nerror: data.path=x: no such file\n")
    assert reason(2, log) == "data.path=x: no such file"
    assert reason(7, log) == "exit code 7: error: data.path=x: no such file"
    assert reason(-signal.SIGSEGV, log) == "killed by SIGSEGV"
    run = tmp_path / "run"
    for code, state in (
        (-signal.SIGTERM, "interrupted"),
        (-signal.SIGKILL, "failed"),
        (0, "failed"),
    ):
        settle(run, code, None)
        assert json.loads((run / "status.json").read_text())["state"] == state
        shutil.rmtree(run)
    assert log_of(run) == tmp_path / "logs/run.log"


def test_a_status_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("train.sweep.processes.write_json", full)
    settle(tmp_path / "run", 3, None)
    assert "warning: run failed, and its status cannot be written: " in capsys.readouterr().err


def test_one_experiment_is_a_whole_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    """No -m is needed; grid is nine variants at three seeds."""
    asked: list[int] = []
    monkeypatch.setattr(
        "train.sweep.run.sweep", lambda cells, *_, **__: asked.append(len(cells)) or 0
    )
    coursework = ("four", "heads", "cache", "window")
    for experiment in ("grid", "lr", *(f"coursework/{name}" for name in coursework)):
        assert train([f"experiment={experiment}"]) == 0
    assert asked == [27, 12, 4, 8, 6, 4]


def test_what_may_start_a_gpu_is_done_in_another_process() -> None:
    with apart(gpus=True) as ask:
        first, second = ask(os.getpid), ask(os.getpid)
        with pytest.raises(ValueError, match="invalid literal"):
            ask(int, "seven")
    assert first == second != os.getpid()
    assert not Path(f"/proc/{first}").exists()
    with apart(gpus=False) as ask:
        assert ask(os.getpid) == os.getpid()


def test_a_launcher_is_named_or_refused(
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("compare.cost.plan.probed", lambda models: [0.01] * len(models))
    monkeypatch.setenv("PYTHONPATH", "")  # which the launcher changes
    with pytest.raises(ValueError, match="a launcher is for sweeps"):
        train([*tiny, "hydra/launcher=basic", f"out={tmp_path}/one"])
    ask = ["-m", *tiny, "steps=2", "attn=mha,mqa", f"out='{tmp_path}/a sweep (1)'"]
    with pytest.raises(ValueError, match="nowhere"):
        train([*ask, "hydra/launcher=nowhere"])
    monkeypatch.setattr(
        "compare.cost.plan.probed", lambda models: pytest.fail("no run will be here")
    )
    assert train([*ask, "hydra/launcher=basic"]) == 0
    printed = capsys.readouterr().out
    assert "2 runs, 0 failed" in printed
    assert "may have shared machines" in printed


def test_a_job_of_a_cluster_saves_before_it_is_requeued(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("""
import json, pathlib, signal, sys, time
out = pathlib.Path(next(o for o in sys.argv if o.startswith("out="))[4:])
def save(*_):
    time.sleep(0.5)
    (out / "status.json").write_text(json.dumps({"state": "interrupted", "reason": None, "last_step": 1}))
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
(out / "ready").touch()
time.sleep(600)
""")
    (tmp_path / "run").mkdir()
    program = f"""
import pathlib, signal
from train.sweep import hydra_launcher, processes
processes.ROOT = pathlib.Path({str(tmp_path)!r})
status = pathlib.Path({str(tmp_path / "run/status.json")!r})
signal.signal(signal.SIGUSR2, lambda *_: print("requeued", status.read_text(), flush=True))
hydra_launcher.child_task({{hydra_launcher.CHILD: "out={tmp_path}/run"}})
"""
    job = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert eventually(lambda: (tmp_path / "run/ready").exists())
    job.send_signal(signal.SIGUSR2)
    said, _ = job.communicate(timeout=HANG)
    assert said.startswith('requeued {"state": "interrupted"')


def test_runs_elsewhere_may_ask_for_a_device_that_is_not_here(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    ask = [*(o for o in tiny if o != "device=cpu"), "device=cuda", "dtype=bfloat16", "kernel=cudnn"]
    with pytest.raises(ValueError, match="device=cuda: this machine has none"):
        plan_cells([ask], compose(ask), tmp_path)
    (cell,) = plan_cells([ask], compose(ask), tmp_path, here=False)
    asked = {key: cell.config[key] for key in ("device", "dtype", "kernel", "force")}
    assert asked == {"device": "cuda", "dtype": "bfloat16", "kernel": "cudnn", "force": False}
    with pytest.raises(ValueError, match="n_heads=5"):  # what does not depend on it is checked
        plan_cells([[*ask, "model.n_heads=5"]], compose(ask), tmp_path, here=False)


def test_a_run_that_is_done_without_a_summary_is_resumed(tmp_path: Path) -> None:
    (cell,) = planned(*RUN, "data.path=README.md", parent=tmp_path)
    cell.folder.mkdir()
    assert to_do(cell, retry=False)
    for state, summary, due, due_again in (
        ("done", False, True, True),
        ("done", True, False, False),
        ("failed", False, False, True),
        ("interrupted", False, True, True),
    ):
        (cell.folder / "status.json").write_text(json.dumps({"state": state}))
        (cell.folder / "summary.json").unlink(missing_ok=True)
        if summary:
            (cell.folder / "summary.json").write_text("{}")
        assert (to_do(cell, retry=False), to_do(cell, retry=True)) == (due, due_again)


def test_the_time_left_follows_the_pace_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Planned as 100, 300 and 200 s; the first takes 10 s. Then an earlier start's run is no pace."""
    now = 0.0
    monkeypatch.setattr(display, "perf_counter", lambda: now)
    for name in ("before", "a", "b", "c"):
        (tmp_path / name).mkdir()

    def stands(name: str, state: str, step: int) -> None:
        (tmp_path / name / "status.json").write_text(json.dumps({"state": state, "reason": None}))
        line = {"split": "train", "step": step, "loss": 1.0, "step_ms": 1.0}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        (tmp_path / name / "summary.json").write_text('{"val_perplexity": 9, "wall_seconds": 10}')

    stands("before", "done", 10)
    stands("c", "interrupted", 5)
    seconds = {"before": 0.0, "a": 100.0, "b": 300.0, "c": 200.0}
    board = Board([Watched(name, tmp_path / name, 10, s) for name, s in seconds.items()])
    assert board.left() is None
    stands("a", "running", 5)
    now = 5.0
    assert board.left() == pytest.approx(0.1 * (50 + 300 + 100))
    stands("a", "done", 10)
    now = 10.0
    board.ended(tmp_path / "a")
    stands("b", "failed", 1)
    board.ended(tmp_path / "b")
    now = 40.0
    stands("c", "done", 10)
    board.ended(tmp_path / "c")
    assert capsys.readouterr().err.splitlines() == [
        "2/4  a: done, perplexity 9.000, 10 s, about 40 s left",
        "at this pace the sweep takes about 50 s in all",
        "3/4  b: failed, None, about 8 s left",
        "4/4  c: done, perplexity 9.000, 10 s",
    ]
