"""From the command line to a plain config, and what is said of a wrong one."""

import json
import re
from pathlib import Path

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from omegaconf import OmegaConf

from cli.entry import run_command
from cli.train import train
from compare.check.properties import composed
from model.attention.grouped import GQA
from train.config.compose import CONFIGS, choices_of, compose, expand
from train.setup.build import build_model, target
from train.setup.match import compose_matched
from train.setup.run_setup import check
from train.sweep.expand import cell_names, cells_of

GROUPS = ("model", "attn", "pos", "data", "objective", "tune", "optim")


@pytest.mark.parametrize(
    "choice", [f"{g}={c}" for g in (*GROUPS, "experiment") for c in choices_of(g)]
)
def test_every_yaml_composes_and_fits_its_constructors(choice: str) -> None:
    needed = {
        "data=text": ["data.path=README.md"],
        "data=hub": ["data.path=owner/name"],
        "data=lines": ["data.path=README.md"],
        "data=pairs": ["data.train=tests/data/pairs.tsv"],
        "tune=prompt": ["pos=rope"],
        "tune=ptuning": ["pos=rope"],
        "experiment=nanogpt": ["data.path=README.md"],
        "experiment=speedrun": ["data.path=README.md"],
    }
    large = ["force=true"] if "llama3" in choice else []
    config = compose([choice, *needed.get(choice, large)])
    group, name = choice.split("=")
    assert group == "experiment" or config["choices"][group] == name
    assert json.loads(json.dumps(config)) == config
    check(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("kernel=flush", "kernel=flush: no such choice; did you mean flash"),
        (
            "kernel=flash model.dropout=0.1",
            "kernel=flash has no dropout on a CPU, and dropout is 0.1",
        ),
        ("kernel=flash pos=t5", "kernel=flash has no gradient for the bias of T5"),
        ("kernel=flash attn=mla pos=t5", "kernel=flash has no gradient for the bias of T5"),
    ],
)
def test_a_kernel_that_cannot_be_had_is_refused_in_one_line(
    overrides: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["data.path=README.md", "device=cpu", "steps=0", f"out={tmp_path}/run"]
    assert run_command(train, [*asked, *overrides.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_kernel_is_refused_to_a_mechanism_with_computations_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(GQA, "kernel", lambda *_: "scores")
    check(compose(["attn=mqa"]))
    with pytest.raises(ValueError, match="kernel=flash: MQA computes by scores alone"):
        check(compose(["attn=mqa", "kernel=flash"]))


def test_numbers_may_be_spelled_as_people_do() -> None:
    config = compose(["steps=1e3", "optim.lr=5e-4", "data.vocab_size=4_096", "optim.clip=2"])
    settings = check(config).settings
    assert settings.steps == 1000
    assert isinstance(settings.steps, int)
    assert config["optim"]["lr"] == 5e-4


@pytest.mark.parametrize(
    "overrides",
    [
        "attn=gqa attn.n_kv_heads=1 pos=rope pos.base=5e3 steps=1e3",
        "attn=pattern attn@attn.global=mha attn.local.window=8 pos=rope",
        "data=text data.path=[a,'b,c'] sample={tokens:5} sample.top_k=null",
        "experiment=grid model.dim=1 model=gpt2 ++steps=${batch_size}",
    ],
)
def test_values_are_set_as_hydra_sets_them(overrides: str) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        expected = hydra_compose("train", overrides.split())
    composed = compose(overrides.split())
    del composed["choices"]
    assert composed == OmegaConf.to_container(expected, resolve=True)


def test_values_of_one_config_do_not_reach_the_next() -> None:
    """Groups are composed once for all of them."""
    assert compose(["optim.lr=0.5"])["optim"]["lr"] == 0.5
    assert compose([])["optim"]["lr"] != 0.5


def test_text_may_hold_any_character() -> None:
    for text in ("f(x)", "a=b", "it's", "back\\slash", "[", "{a", "50%", "é"):
        assert compose([f"sample.prompt={text}"])["sample"]["prompt"] == text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("attn=gqaa", r"attn=gqaa: no such choice; did you mean gqa\? \(known: .*gqa, .*mha, "),
        ("model.n_head=4", r"model.n_head: no such key; did you mean model.n_heads\?"),
        ("stepz=3", r"stepz: no such key; did you mean steps\?"),
        ("+new=3", "new: no such key"),
        ("model.dim.x=3", "model.dim.x: no such key; model.dim has none"),
        (
            "attn=mqa attn.n_kv_heads=3",
            r"attn.n_kv_heads: no such key here; .*attn=gqa, .*attn=sliding, .*have it",
        ),
        (
            "attn=mha attn.n_kv_heads=2",
            r"attn.n_kv_heads: no such key here; .*attn=gqa, .*attn=sliding, .*have it",
        ),
        ("steps", "steps: write KEY=VALUE"),
        ("attn=mha,gqa", "several values need -m"),
        ("data=text", r"data.path has no value yet: give data.path=..."),
        ("~seed", "~seed: seed cannot be left out"),
        ("~attn", "~attn: attn cannot be left out"),
        ("steps=-1", "steps=-1 must be at least 0"),
        ("steps=1.5", "steps=1.5 is not a whole number"),
        ("steps=many", "steps=many is not a whole number"),
        ("steps=true", "steps=True is not a whole number"),
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("accumulate=33", "accumulate=33 is more than batch_size=32"),
        ("optim.lr=-1", "optim.lr=-1.0 must be above 0"),
        ("optim.lr=nan", "optim.lr=nan is not a finite number"),
        ("optim.lr=inf", "optim.lr=inf is not a finite number"),
        ("optim.beta2=1", "optim.beta2=1.0 must be at least 0 and below 1"),
        ("optim.clip=0", "optim.clip=0.0 must be above 0"),
        ("optim.schedule=cos", "optim.schedule=cos is not one of constant, cosine"),
        ("model.dropout=1.5", "dropout=1.5 must be at least 0 and below 1"),
        ("model.bias=3", "model.bias=3 is not true or false"),
        ("model.norm=batchnorm", "model.norm=batchnorm: no such choice"),
        ("model.n_heads=5", "dim=192 must be a multiple of n_heads=5"),
        ("pos=rope model.dim=36 model.n_heads=4", "even head_dim.*= 9"),
        ("attn=gqa attn.n_kv_heads=4 model.n_heads=6", "n_kv_heads=4.*n_heads=6.*1, 2, 3, 6"),
        ("device=tpu", r"device=tpu: no such choice"),
        ("dtype=float16", r"dtype=float16 is for CUDA, not for cpu; bfloat16 and float32 work"),
        ("wandb.mode=on", "wandb.mode=on: no such choice"),
        ("name=../x", "may hold letters"),
        ("sample.prompt=''", "sample.prompt is empty; null takes one from the text"),
        ("sample.top_k=0", "sample.top_k=0 must be at least 1"),
        ("data=text data.path=/no/such/file", "data.path=/no/such/file: no such file"),
        ("init_from=/no/such/run", "is not a run"),
    ],
)
def test_a_mistake_is_one_line_that_names_what_would_work(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        check(compose(overrides.split()))
    assert "\n" not in str(error.value)


def test_memory_is_that_of_what_is_trained_and_of_the_rows_that_ask() -> None:
    """12 bytes a trained parameter, 4 of a frozen one, and latents instead of tokens."""
    asked = ["pos=rope", "model.vocab_size=2048", "eval_batch_size=1"]
    plain, tuned, latents = (
        check(compose([*asked, *keys.split()])).least_bytes
        for keys in (
            "",
            "tune=lora init_from=tests/old_runs/mha",
            "model.latents=8 model.n_layers=5",
        )
    )
    params, trained = 1_327_104, 82_944
    assert plain - tuned > 8 * params - 12 * trained
    more = check(compose([*asked, "model.n_layers=5"])).least_bytes
    assert more - latents == 2 * 32 * 192 * 5 * (128 - 8)


def test_two_patterns_are_tried_in_all_their_pairs() -> None:
    """Only in the sixth layer does the second attention meet the third scheme, which turns a part."""
    asked = [
        *("model.n_layers=6", "attn=pattern", "attn@attn.local=mha", "attn@attn.global=mla"),
        *("attn.pattern=[local,global]", "pos=pattern", "pos@pos.global=rope"),
        *("attn.global.rope_dim=6", "pos.global.rotary_fraction=0.5"),
        "pos.pattern=[local,local,global]",
    ]
    with pytest.raises(ValueError, match="rotary_fraction|rope_dim|width"):
        check(compose(asked))


def test_a_missing_gpu_is_said_and_one_that_torch_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("train.measure.device.DRIVER", tmp_path / "version")
    with pytest.raises(ValueError, match="device=cuda: this machine has none; it has .*cpu"):
        check(compose(["device=cuda"]))
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05")
    for built_for, why in (("13.0", "is too old for this torch, built for CUDA 13.0"),
                           (None, "this torch cannot use: it is built without CUDA")):  # fmt: skip
        monkeypatch.setattr("torch.version.cuda", built_for)
        with pytest.raises(ValueError, match=f"NVIDIA driver, 535.104.05, that {why}") as error:
            check(compose(["device=cuda"]))
        assert "\n" not in str(error.value)


def test_a_sweep_is_every_combination() -> None:
    cells = list(expand(["attn=mha,gqa", "seed=0,1", "steps=3", "sample.prompt='a,b'"]))
    assert len(cells) == 4
    assert cells[0][:3] == ["attn=mha", "seed=0", "steps=3"]
    assert compose(cells[3])["sample"]["prompt"] == "a,b"
    everything = list(expand(["attn=glob(*)", "pos=glob(*,exclude=none)", "seed=range(3)"]))
    assert len(everything) == len(choices_of("attn")) * (len(choices_of("pos")) - 1) * 3


@pytest.mark.parametrize(
    "path",
    [
        "os.system",
        "torch.load",
        "model.attention.grouped.Tensor",
        "model.attention.grouped.torch.hub.load",
        "model.attention.grouped.divisors",
        "model.attention.attend.attend",
        "model.position.rope.RoPE",
        "model.attention.nothing.X",
        "model.attention",
        "",
    ],
)
def test_a_config_can_name_only_classes_defined_in_their_package(path: str) -> None:
    with pytest.raises(ValueError, match="is no class defined in model.attention"):
        target("attn", {"_target_": path}, "attn")


def test_a_new_variant_is_one_python_file_and_one_yaml() -> None:
    """Nothing names a scheme but its own file, siblings that build on it, and what hands it over."""
    code = [
        p
        for folder in ("model", "data", "train", "compare")
        for p in (CONFIGS.parent / folder).rglob("*.py")
        if p.name != "huggingface.py"  # it says which schemes transformers has, too
    ]
    for group, folder in (("attn", "attention"), ("pos", "position")):
        for name in choices_of(group):
            node = composed(f"{group}={name}")[group]
            for part in (
                v for v in [node, *node.values()] if isinstance(v, dict) and "_target_" in v
            ):
                cls = target(group, part, group)
                for path in code:
                    if CONFIGS.parent / "model" / folder not in path.parents:
                        assert not re.search(rf"import {cls.__name__}\b", path.read_text()), path


def test_room_in_the_vocabulary_is_allowed_and_lack_of_it_refused() -> None:
    assert build_model(composed("model.vocab_size=100"), 17).shape.vocab_size == 100
    with pytest.raises(ValueError, match="model.vocab_size=10 is smaller than the tokenizer's 17"):
        build_model(composed("model.vocab_size=10"), 17)


def test_an_experiment_may_name_its_own_runs() -> None:
    cells = cells_of(["experiment=coursework/cost", "seed=3"], multirun=False)
    assert [c[:-1] for c in cells] == [
        ["attn=mha", "experiment=coursework/cost", "seed=3"],
        ["attn=gqa", "attn.n_kv_heads=4", "experiment=coursework/cost", "seed=3"],
        ["attn=mqa", "experiment=coursework/cost", "seed=3"],
    ]
    assert all(compose(cell)["sweep"] is None for cell in cells)


@pytest.mark.parametrize("choice", [c for c in choices_of("experiment") if c != "uptrain"])
def test_the_runs_of_every_experiment_can_be_built(choice: str) -> None:
    """And its baseline is one: of the first run and of the last."""
    needed = ["data.path=README.md"] * (choice in ("nanogpt", "speedrun"))
    cells = cells_of([f"experiment={choice}", *needed], multirun=False)
    for cell in (cells[0], cells[-1]):
        check(compose_matched(cell) | {"force": True})


def test_the_command_line_wins_over_the_lines_of_a_sweep() -> None:
    sweep = "sweep=['attn=mha,gqa seed=0,1','attn=mqa seed=0,1']"
    cells = cells_of([sweep, "seed=5"], multirun=False)
    assert [cell[0] for cell in cells] == ["attn=mha", "attn=gqa", "attn=mqa"]
    assert {compose(cell)["seed"] for cell in cells} == {5}
    both = cells_of([sweep, "seed=5,6"], multirun=True)
    assert len(both) == 6
    assert cells_of(["attn=mqa", "seed=5"], multirun=False) == [["attn=mqa", "seed=5"]]
    line = "sweep=['attn=gqa attn.n_kv_heads=4 seed=0']"
    assert cells_of([line, "attn=mla", "++seed=5"], multirun=False) == [
        [line, "attn=mla", "++seed=5", "sweep=null"]
    ]
    for nothing in ("sweep=3", "sweep=[]"):
        with pytest.raises(ValueError, match=r"sweep=(3|\[\]) is not a list"):
            cells_of([nothing], multirun=False)


def test_a_conversion_needs_a_run_to_convert() -> None:
    with pytest.raises(ValueError, match=r"init_from has no value yet: give init_from=..."):
        cells_of(["experiment=uptrain"], multirun=False)
    given = cells_of(["experiment=uptrain", "init_from=some/run"], multirun=False)
    assert [compose(c)["init_from"] for c in given] == ["some/run"] * 3


def test_a_group_is_no_single_value() -> None:
    for given in ("report=null", "report=5"):
        with pytest.raises(ValueError, match=r"report=\w+ is not a group of keys"):
            train([given])


def test_plan_is_a_yes_or_a_no() -> None:
    with pytest.raises(ValueError, match="plan=maybe is not true or false"):
        train(["plan=maybe"])


def test_cells_are_named_by_what_differs() -> None:
    cells = [["a=1", "attn=mha", "s=null"], ["a=1", "attn=gqa", "attn.n_kv_heads=4", "s=null"]]
    assert cell_names(cells) == ["attn-mha", "attn-gqa_attn.n_kv_heads-4"]
