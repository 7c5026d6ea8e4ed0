"""One run in several processes: the losses of one, whatever is killed."""

import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import ended
from tiny import HANG, RUN, build, eventually, tokens

from model.loss import token_nll
from train.config.compose import compose
from train.config.schema import Config
from train.measure.device import Device
from train.measure.memory import PeakMemory
from train.optim.loss_scale import LossScale
from train.parallel.ranks import SRUN, TORCHRUN, Ranks
from train.parallel.shard import bytes_here, gathered
from train.record.run_log import NoRecord, Record, records
from train.run import chosen_before, run_training
from train.setup.run_setup import assemble, check
from train.trainer import SAVE_SECONDS, Trainer, TrainingStopped

PLACE = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
#: Without clipping, nothing of a step depends on the order in which the gradient norm is added up.
SHARDED = ["shard=full", "optim.clip=null"]
Losses = list[tuple[int, str, float, float | None]]
Work = Callable[[Config], int]


def losses(folder: Path) -> Losses:
    lines = records(folder / "metrics.jsonl")
    return [(r["step"], r["split"], r["loss"], r.get("grad_norm")) for r in lines]


def without_norms(folder: Path, kind: list[str]) -> Losses:
    """The losses, and the norms too unless a sharded model has them: it adds them up in another order."""
    return [(*line[:3], None) if kind else line for line in losses(folder)]


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def ask(text: Path, tmp_path: Path) -> list[str]:
    return [*RUN, "attn=gqa", "pos=rope", f"data.path={text}", f"data.cache={tmp_path}/cache"]


class Forked:
    """A process of a run, as a fork of this one: it need not import torch again."""

    def __init__(
        self, said: Path, *overrides: str, work: Work = run_training, **variables: str
    ) -> None:
        config = compose(list(overrides))
        self.said = said
        self.process = os.fork()
        if self.process:
            return
        code = 70
        try:
            os.environ.update(variables)
            with said.open("w") as sink, redirect_stdout(sink), redirect_stderr(sink):
                code = work(config)
        finally:
            os._exit(code)

    def ended(self) -> tuple[int, str]:
        """Its exit code and what it said."""
        code = ended(self.process, HANG)
        assert code is not None, self.said.read_text()
        return code, self.said.read_text()

    def others(self) -> list[int]:
        """The processes that it started, of the same run."""
        listed = Path(f"/proc/{self.process}/task/{self.process}/children").read_text().split()
        commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in listed}
        return [pid for pid, command in commands.items() if "train.py" in command]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def in_two(tmp_path: Path, *overrides: str, work: Work = run_training) -> None:
    """Run two processes as torchrun would start them, to a good end."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    both = [
        Forked(tmp_path / rank, *overrides, work=work, RANK=rank, LOCAL_RANK=rank, **meeting)
        for rank in "01"
    ]
    for process in both:
        code, said = process.ended()
        assert code == 0, said


@pytest.mark.parametrize(
    "recipe",
    [["dtype=float32"], ["dtype=bfloat16"], ["dtype=float32", "model.dropout=0.1", "optim=muon"]],
    ids=["float32", "bfloat16", "dropout"],
)
def test_two_processes_have_the_losses_of_one_bit_for_bit(
    recipe: list[str], ask: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_training(compose([*ask, *recipe, "accumulate=2", f"out={whole}"])) == 0
    in_two(tmp_path, *ask, *recipe, f"out={parts}")
    assert losses(parts) == losses(whole)
    for name in ("model", "optimizer"):
        one, two = (
            (run / f"checkpoints/step_000012/{name}.safetensors").read_bytes()
            for run in (whole, parts)
        )
        assert one == two
    assert json.loads((parts / "environment.json").read_text())["processes"] == 2
    assert json.loads((parts / "config.json").read_text())["accumulate"] == 2


@pytest.mark.parametrize(
    "recipe",
    [
        "dtype=float32 model.dropout=0.1",
        "dtype=float32 model.dropout=0.1 optim=muon model.tie_embeddings=false",
        "dtype=bfloat16 memory=lean model.bottleneck=8 model.n_layers=3",
    ],
    ids=["adamw", "muon", "lean"],
)
def test_a_sharded_model_has_the_losses_of_one_bit_for_bit(
    recipe: str, ask: list[str], tmp_path: Path
) -> None:
    """Training and validation; gradient norms are sums in another order."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ask = [*ask, *recipe.split(), "optim.clip=null"]
    assert run_training(compose([*ask, "accumulate=2", f"out={whole}"])) == 0
    in_two(tmp_path, *ask, "shard=full", f"out={parts}")
    for one, two in zip(losses(whole), losses(parts), strict=True):
        assert two[:3] == one[:3]
        assert two[3] == (one[3] and pytest.approx(one[3], rel=1e-5))
    for name in ("model", "optimizer"):
        one, two = (
            (run / f"checkpoints/step_000012/{name}.safetensors").read_bytes()
            for run in (whole, parts)
        )
        assert one == two


def test_a_sharded_model_is_clipped_as_one(ask: list[str], tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ask = [*ask, "dtype=float32", "model.dropout=0.1", "optim.clip=0.5"]
    assert run_training(compose([*ask, "accumulate=2", f"out={whole}"])) == 0
    in_two(tmp_path, *ask, "shard=full", f"out={parts}")
    assert min(norm for *_, norm in losses(whole) if norm) > 0.5
    for one, two in zip(losses(whole), losses(parts), strict=True):
        assert two[2] == pytest.approx(one[2], abs=1e-5)


def test_each_process_holds_its_part_of_a_sharded_model(ask: list[str], tmp_path: Path) -> None:
    """Of parameters, gradients and optimizer state; an overflow in one part is found in all."""

    def look(config: Config) -> int:
        ranks = Ranks.given()
        assert ranks
        ranks.connect()
        trainer = Trainer(
            assemble(check(config | {"gpus": 2}), ranks=ranks),
            Record(tmp_path / f"held{ranks.rank}"),
        )
        trainer.update(0)
        trainer.score()  # frees what it gathers
        parameters = list(trainer.model.parameters())
        for p in parameters:
            p.grad = torch.zeros_like(p)
        if ranks.rank == 1:
            parameters[0].grad.to_local().fill_(torch.inf)
        found = LossScale("cpu").unscale(parameters)
        complete = gathered(trainer.optimizer.parameters, keep=ranks.leader)
        held = {
            "parameters": sum(map(bytes_here, parameters)),
            "optimizer": trainer.optimizer.nbytes,
            "gathered": sum(p.nbytes for p in complete.values()),
            "found": found.item(),
        }
        (tmp_path / f"held{ranks.rank}.json").write_text(json.dumps(held))
        ranks.end(well=True)
        return 0

    in_two(tmp_path, *ask, "shard=full", f"out={tmp_path}/parts", work=look)
    first, second = (json.loads((tmp_path / f"held{r}.json").read_text()) for r in (0, 1))
    model = assemble(check(compose([*ask, f"out={tmp_path}/one"]))).model
    all_bytes = sum(p.nbytes for p in model.parameters())
    tensors = len(list(model.parameters()))
    assert first["parameters"] + second["parameters"] == all_bytes
    assert first["parameters"] == pytest.approx(all_bytes / 2, rel=0.02)
    both = first["optimizer"] + second["optimizer"]
    assert both == 2 * (all_bytes + 4 * tensors)  # each counts its steps
    assert (first["gathered"], second["gathered"]) == (all_bytes, 0)
    assert first["found"] == second["found"] == 1


def test_what_one_process_cannot_measure_of_a_sharded_model_is_null(
    ask: list[str], tmp_path: Path
) -> None:
    in_two(tmp_path, *ask, "shard=full", f"out={tmp_path}/parts")
    summary = json.loads((tmp_path / "parts/summary.json").read_text())
    unknown = "attention_ms attention_share peak_train_bytes peak_eval_bytes peak_method"
    assert {summary[key] for key in (*unknown.split(), "kv_cache_bytes_per_token")} == {None}
    assert summary["parameter_bytes"] == pytest.approx(2 * summary["params"], rel=0.02)
    assert summary["mfu"] > 0
    assert not (tmp_path / "parts/sample.txt").exists()
    assert "warning" not in (tmp_path / "0").read_text()


def test_peak_memory_is_that_of_the_process_with_the_most(
    ask: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the process, and what CUDA allocated and reserved; the largest may be any one's."""

    def here(*most: int) -> Callable[[], int]:
        return lambda: most[int(os.environ["RANK"])]

    def note(config: Config) -> int:
        ranks, peaks, device = Ranks.given(), PeakMemory(), Device("cuda", torch.float32)
        assert ranks
        ranks.connect()
        peaks.note_training(device, ranks)
        peaks.note_validation(device, ranks)
        (tmp_path / f"peaks{ranks.rank}.json").write_text(json.dumps(asdict(peaks)))
        ranks.end(well=True)
        return 0

    monkeypatch.setattr("train.measure.memory.process_peak", here(1, 2))
    monkeypatch.setattr("torch.cuda.max_memory_allocated", here(5, 4))
    monkeypatch.setattr("torch.cuda.max_memory_reserved", here(6, 7))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: None)
    in_two(tmp_path, *ask, work=note)
    for rank in (0, 1):
        found = json.loads((tmp_path / f"peaks{rank}.json").read_text())
        assert found == {"graphs": False, "train": 5, "eval": 5, "reserved": 7, "process": 2}
    in_two(tmp_path, *ask, f"out={tmp_path}/run")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["peak_process_bytes"] == 2
    assert summary["peak_reserved_bytes"] is None


def test_a_checkpoint_that_is_late_in_one_process_is_late_in_all(
    ask: list[str], tmp_path: Path
) -> None:
    def agree(config: Config) -> int:
        ranks = Ranks.given()
        assert ranks
        ranks.connect()
        trainer = Trainer(assemble(check(config | {"gpus": 2}), ranks=ranks), NoRecord(tmp_path))
        found = []
        for seconds in (0.0, SAVE_SECONDS * ranks.rank):
            trainer.started -= seconds
            trainer.agree()
            found.append(trainer.late)
        (tmp_path / f"late{ranks.rank}.json").write_text(json.dumps(found))
        ranks.end(well=True)
        return 0

    in_two(tmp_path, *ask, work=agree)
    for rank in (0, 1):
        assert json.loads((tmp_path / f"late{rank}.json").read_text()) == [False, True]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a run in /proc")
@pytest.mark.parametrize(
    ("victim", "kind"), [("other", []), ("leader", []), ("other", SHARDED)], ids=str
)
def test_a_run_whose_processes_are_killed_goes_on_in_one(
    victim: str, kind: list[str], ask: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = ["steps=80", "save_every=20", "model.dropout=0.1", "accumulate=2", *kind[1:]]
    leader = Forked(tmp_path / "said", *ask, *long, *kind, "gpus=2", f"out={parts}")
    assert eventually(lambda: parts.is_dir() and len(losses(parts)) > 25)
    others = leader.others()
    assert len(others) == 1
    os.kill(others[0] if victim == "other" else leader.process, signal.SIGKILL)
    code, said = leader.ended()
    assert eventually(lambda: not Path(f"/proc/{others[0]}").exists())
    if victim == "other":
        assert code == 3
        assert "process 1 of the run ended with -9" in said
        assert "Traceback" not in said
        assert status(parts)["state"] == "failed"
    assert run_training(compose([*ask, *long, f"out={parts}", "resume=true"])) == 0
    assert run_training(compose([*ask, *long, f"out={whole}"])) == 0
    assert without_norms(parts, kind) == without_norms(whole, kind)


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a run in /proc")
@pytest.mark.parametrize(
    ("kind", "then"), [([], []), (SHARDED, SHARDED), (SHARDED[1:], SHARDED)], ids=str
)
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    kind: list[str], then: list[str], ask: list[str], tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = ["steps=60", "save_every=null", "accumulate=2", *kind[-1:]]
    leader = Forked(tmp_path / "said", *ask, *long, *kind, "gpus=2", f"out={parts}")
    assert eventually(lambda: parts.is_dir() and len(losses(parts)) > 20)
    os.kill(leader.others()[0], signal.SIGTERM)
    code, said = leader.ended()
    assert code == 128 + signal.SIGTERM, said
    assert status(parts)["state"] == "interrupted"
    stopped = status(parts)["last_step"]
    assert [p.name for p in (parts / "checkpoints").iterdir()] == [f"step_{stopped:06d}"]
    again = Forked(tmp_path / "again", *ask, *long, *then, "gpus=2", f"out={parts}", "resume=true")
    code, said = again.ended()
    assert code == 0, said
    assert ("shard changed from none to full" in said) == (kind != then)
    assert run_training(compose([*ask, *long, f"out={whole}"])) == 0
    assert without_norms(parts, then) == without_norms(whole, then)


def test_a_signal_that_others_do_not_know_of_waits_for_the_next_step(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes while the processes ask each other would otherwise stop one of them alone."""
    trainer = Trainer(assemble(check(config())), Record(tmp_path / "run"))
    real = Ranks.most

    def most(ranks: Ranks, numbers: list[int]) -> list[int]:
        found = real(ranks, numbers)
        if trainer.step == 3:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(Ranks, "most", most)
    with pytest.raises(TrainingStopped, match="SIGTERM"):
        trainer.fit()
    assert trainer.step == 4


@pytest.mark.parametrize("size", [2, 3, 5])
def test_a_text_that_is_scored_in_shares_has_the_same_sum(size: int) -> None:
    text = tokens(400)
    options: dict[str, Any] = {"context": 16, "stride": 16, "batch_size": 3, "device": "cpu"}
    model = build("gqa", "rope")
    whole = token_nll(model, text, **options)
    batches: list[int] = []
    shares = [
        token_nll(model, text, share=(r, size), on_batch=lambda r=r: batches.append(r), **options)
        for r in range(size)
    ]
    assert torch.equal(sum(shares), whole)
    assert len({batches.count(rank) for rank in range(size)}) == 1  # in step with each other
    assert all(share.count_nonzero() < whole.count_nonzero() for share in shares)


def test_the_others_end_where_there_is_nothing_to_do(ask: list[str], tmp_path: Path) -> None:
    """A run that is done already, and one that is refused."""
    out = [*ask, f"out={tmp_path}/run"]
    assert run_training(compose([*out, "accumulate=2"])) == 0
    in_two(tmp_path, *out, "resume=true")

    def refused(config: Config) -> int:
        with contextlib.suppress(ValueError):
            return run_training(config)
        return 0

    in_two(tmp_path, *out, work=refused)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (PLACE | {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, (1, 4, 1)),
        (PLACE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, None),
        (PLACE | {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        (PLACE | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0"}, None),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, None),  # no srun
    ],
)
def test_ranks_are_those_of_torchrun_and_srun(
    variables: dict[str, str], found: tuple[int, int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*TORCHRUN, *SRUN, *PLACE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ranks = Ranks.given()
    assert (ranks and (ranks.rank, ranks.size, ranks.local)) == found


def test_micro_batches_are_shared_evenly(config: Callable[..., Config]) -> None:
    assert [list(Ranks(rank, 3).share(6)) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert check(config("gpus=4")).config["accumulate"] == 4
    assert check(config("gpus=4", "accumulate=8", "batch_size=8")).config["accumulate"] == 8
    assert check(config() | {"gpus": 2}).config["accumulate"] == 2
    with pytest.raises(ValueError, match="accumulate=3, .* must be a multiple of gpus=2"):
        check(config("gpus=2", "accumulate=3"))


def test_a_run_goes_on_with_another_number_of_processes() -> None:
    """Its micro-batches, one for each, stay; those that it was given stay refused."""
    began = {"compile": False, "gpus": 2, "accumulate": 2}
    asked = compose(["gpus=1"])
    assert chosen_before(began, asked) == {"compile": False, "accumulate": 2}
    assert "accumulate" not in chosen_before(began | {"gpus": 1}, asked)
    assert "accumulate" not in chosen_before(began, asked | {"accumulate": 4})


def test_processes_that_do_not_meet_end_the_run(
    ask: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.py").write_text("raise SystemExit('no such luck')")
    monkeypatch.setattr("train.parallel.ranks.ROOT", tmp_path)
    run = Forked(tmp_path / "said", *ask, "gpus=2", f"out={tmp_path}/run")
    code, said = run.ended()
    assert (code, said.strip()) == (
        3, "failed: process 1 of the run ended with 1: no such luck"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("shard=full", "gpus=1 is one; gpus=2 or more, or shard=none"),
        ("shard=half gpus=2 accumulate=2", "shard=half: no such choice; known: full, none"),
        ("shard=full gpus=2 accumulate=2 compile=true", "compile=true does not work"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(
    overrides: str, message: str, config: Callable[..., Config]
) -> None:
    with pytest.raises(ValueError, match=message):
        check(config(*overrides.split()))


def test_a_sharded_model_needs_its_part_of_the_memory(config: Callable[..., Config]) -> None:
    two = ("gpus=2", "accumulate=2", "model.dim=256")
    whole, part = (check(config(*two, f"shard={kind}")).least_bytes for kind in ("none", "full"))
    assert part < 0.6 * whole
