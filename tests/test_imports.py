"""Imports point one way, without circles, and nothing in the packages can run code from a file."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from tiny import RUN

ROOT = Path(__file__).resolve().parents[1]
#: From the ground up: a package imports itself and those below it; model and data do not meet.
PACKAGES = ("model", "data", "train", "compare", "cli", "bench")
#: The rooms of a package, from the ground up: none imports one above it.
FLOORS = {
    "model": "shape ops position attention feedforward transformer perceiver tuning init cost loss generate",
    "data": "atomic tokenizer people characters grammar probes source corpus objective",
    "train": "config parallel record measure optim setup step step_estimate trainer summary run sweep",
    "compare": "cost statistics report check lab evaluate judge",
}
FILES = {p: p.read_text() for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py"))}
TREES = {path: ast.parse(text) for path, text in FILES.items()}
#: The only files that may name a library, by its package.
ONLY_IN = {
    "wandb": {"train/record/wandb_process.py"},
    "hydra": {"train/config/compose.py", "train/sweep/hydra_launcher.py"},
    "omegaconf": {"train/config/compose.py", "train/sweep/hydra_launcher.py"},
}
#: The only files whose functions import, and why.
LAZY = {
    "data/source.py": "datasets takes a second, and a cached corpus never needs it",
    "model/ops/flex_attention.py": "it loads torch's compiler, and is asked for by name",
    "model/ops/window_attention.py": "it loads torch's compiler, and windows on CUDA alone want it",
    "train/measure/memory.py": "Windows has no resource",
    "train/parallel/shard.py": "torch's sharding takes a second, and loads its compiler",
    "train/record/wandb_process.py": "wandb is for the process that logs",
    "train/setup/match.py": "torch takes two seconds, and most runs match nothing",
    "compare/cost/counts.py": "the memory tracker takes a second",
    "compare/evaluate/harness.py": "lm-eval takes a second, and reads the environment that is set first",
    "cli/report.py": "help and bad input are answered before pandas and matplotlib are loaded",
    "cli/entry.py": "rich is for messages alone",
    "cli/evaluate.py": "help and bad input are answered before torch is loaded",
    "cli/train.py": "help and bad input are answered before torch is loaded",
    "bench/peers.py": "peers are optional",
}
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
MOST = 12  # entries that a folder shows
#: Folders that may show more, and why.
EXEMPT = {
    ".": "the commands and what tools look for there",
    "configs/*": "Hydra's groups are flat: a choice is a file",
    "model/position": "a scheme is a file, also one that a reader adds",
    "model/attention/extensions": "a mechanism is a file",
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


def imported(tree: ast.AST) -> Iterator[str]:
    """Names that a file imports, `from a import b` as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return libraries(set(imported(TREES[path])))


def ours(name: str) -> str:
    """Our module that an imported name is or belongs to; empty if it is a library's."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name


def edges() -> Iterator[tuple[str, str]]:
    """Pairs of our modules of which the first imports the second."""
    for one, path in MODULES.items():
        for two in map(ours, imported(TREES[path])):
            if two and two != one:
                yield one, two


def loaded(module: str) -> set[str]:
    """Names that are imported, here or further on, when a module of ours is."""
    found: set[str] = set()
    waiting = {module}
    while waiting:
        tree = TREES[MODULES[waiting.pop()]]
        names = set().union(*(imported(n) for n in tree.body if not isinstance(n, FUNCTIONS)))
        waiting |= {ours(name) for name in names - found} - {""}
        found |= names
    return found


def libraries(names: set[str]) -> set[str]:
    """The packages of imported names."""
    return {name.split(".")[0] for name in names}


EDGES = sorted(set(edges()))


def rooms(folder: str) -> dict[str, set[str]]:
    """The files and folders in a folder, each with those beside it that it imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    prefix = f"{folder}." if folder else ""
    for pair in EDGES:
        if all(name.startswith(prefix) for name in pair):
            one, two = (name.removeprefix(prefix).split(".")[0] for name in pair)
            if one != two:
                graph[one].add(two)
    return graph


FOLDERS = sorted({m.rpartition(".")[0] for m in MODULES})
names = pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_circle_between_files_or_folders(folder: str) -> None:
    try:
        TopologicalSorter(rooms(folder)).prepare()
    except CycleError as error:
        pytest.fail(f"{folder or 'the project'}: {' -> '.join(error.args[1])}")


def test_no_circle_between_modules() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for one, two in EDGES:
        graph[one].add(two)
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_packages_import_those_below() -> None:
    for one, two in EDGES:
        upper, lower = (PACKAGES.index(name.split(".")[0]) for name in (one, two))
        assert upper >= lower, f"{one} imports {two}"
        assert (upper, lower) != (1, 0), f"{one} imports {two}"


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_points_up(package: str) -> None:
    floors = FLOORS[package].split()
    here = {
        p.stem
        for p in (ROOT / package).iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert here - {"__init__"} <= set(floors), "a room without a floor"
    for one, others in rooms(package).items():
        for other in others:
            assert floors.index(one) > floors.index(other), f"{package}: {one} imports {other}"


def visible(folder: Path) -> list[str]:
    """Names in a folder but for those of Python, tools and results."""
    hidden = re.compile(r"__|\.|.*\.egg-info$" + ("|outputs$" if folder == ROOT else ""))
    return sorted(p.name for p in folder.iterdir() if not hidden.match(p.name))


def folders(folder: Path = ROOT) -> Iterator[Path]:
    """A folder and all visible ones inside it."""
    yield folder
    for name in visible(folder):
        if (folder / name).is_dir():
            yield from folders(folder / name)


def test_a_folder_shows_at_most_a_dozen() -> None:
    shown = {p.relative_to(ROOT).as_posix(): visible(p) for p in folders()}
    assert {"model/ops", "configs/attn", "tests/model", "docs/results"} <= shown.keys()
    for folder, names in shown.items():
        exempt = {folder, f"{Path(folder).parent.as_posix()}/*"} & EXEMPT.keys()
        assert exempt or len(names) <= MOST, f"{folder}: {', '.join(names)}"


@names
def test_functions_import_only_where_it_is_stated(path: Path) -> None:
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, FUNCTIONS)]
    found = {name for function in functions for name in imported(function)}
    assert bool(found) == (path.relative_to(ROOT).as_posix() in LAZY), found


@pytest.mark.parametrize("command", ["cli.train", "cli.evaluate"])
def test_help_is_not_kept_waiting_by_torch(command: str) -> None:
    assert "torch" not in {name.split(".")[0] for name in loaded(command)}
    assert "hydra" in {name.split(".")[0] for name in loaded(command)}


def test_a_run_is_trained_without_the_compiler(text: Path, tmp_path: Path) -> None:
    """Which takes as long to load as all the rest of torch, nor with what shards a model."""
    slow = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor")
    run = [*RUN, f"data.path={text}", f"data.cache={tmp_path}/cache", f"out={tmp_path}/run"]
    look = f"print('loaded', *(m for m in sys.modules if m.startswith({slow})))"
    code = f"import sys; from cli.train import train; assert train({run}) == 0; {look}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split() == ["loaded"]


def test_what_is_stated_of_files_is_of_files_that_exist() -> None:
    stated = LAZY.keys() | set().union(*ONLY_IN.values())
    assert not [file for file in stated if ROOT / file not in FILES]


@names
def test_libraries_stay_where_they_belong(path: Path) -> None:
    for library, files in ONLY_IN.items():
        assert library not in roots(path) or path.relative_to(ROOT).as_posix() in files
    if path.is_relative_to(ROOT / "model"):
        standard = {"collections", "contextlib", "dataclasses", "hashlib", "math", "typing"}
        assert roots(path) <= {"model", "torch"} | standard


@names
def test_no_file_can_run_code(path: Path) -> None:
    calls = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Call)]
    forbidden = {"eval", "exec", "torch.load", "instantiate", "yaml.load", "os.system"}
    assert not forbidden & {ast.unparse(call.func) for call in calls}
    assert "pickle" not in roots(path)
    for keyword in (keyword for call in calls for keyword in call.keywords):
        if keyword.arg in ("shell", "allow_pickle", "trust_remote_code"):
            assert ast.unparse(keyword.value) == "False"


def test_the_package_wins_over_the_door_of_the_same_name() -> None:
    import train

    assert hasattr(train, "__path__")
    for name in ("evaluate.py", "datasets", "tokenize.py", "profile.py"):
        assert not (ROOT / name).exists(), f"{name} would shadow a package that others import"


@pytest.mark.parametrize("door", ["train.py", "eval.py", "sample.py", "report.py"])
def test_doors_hold_no_logic(door: str) -> None:
    assert len((ROOT / door).read_text().splitlines()) <= 12


@pytest.mark.parametrize("command", ["train", "evaluate", "sample", "report"])
def test_a_command_starts_without_the_libraries_of_the_report(command: str) -> None:
    slow = {"pandas", "scipy", "matplotlib", "jinja2"}
    assert slow <= libraries(loaded("compare.report.write"))
    assert not slow & libraries(loaded(f"cli.{command}"))
