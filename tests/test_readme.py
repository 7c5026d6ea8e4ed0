"""README.md and docs/ tell the truth: commands compose, links lead somewhere, the example scheme works."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cli.entry import compose_command
from cli.evaluate import with_commas
from compare.report.style import ALONE, Figure
from model.position.base import Position
from train.config.compose import choices_of, compose, expand, keys_of
from train.config.old_spellings import current_overrides

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
README = PAGES["README.md"]
COMMAND = re.compile(r"(?:\bpython|uv run --no-sync) ((?:-m )?[\w./]+(?: [^#`;\n]*)?)")
COMMANDS = sorted(
    {(name, found.strip()) for name, page in PAGES.items() for found in COMMAND.findall(page)
     if re.match(r"\S+\.py\b|-m (cli|bench)\.", found) and "drift" not in found}  # the example
)  # fmt: skip


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_is_one_that_works(page: str, command: str) -> None:
    script, *overrides = shlex.split(re.sub(r"\$\w+", "0", command).removeprefix("-m "))
    if "--help" in overrides:
        return
    if script == "train.py":
        for cell in expand([o for o in overrides if o != "-m" and not o.startswith("hydra/")]):
            compose(cell)
    elif script in ("eval.py", "sample.py"):
        name = script.removesuffix(".py")
        current = current_overrides(name, overrides)
        assert current == overrides, "an old spelling"
        assert compose_command([*map(with_commas, current)], name, "") is not None
    elif script.endswith(".py"):
        assert (ROOT / script).is_file()
    else:
        usage = importlib.import_module(script).USAGE
        bare = [o for o in overrides if "=" not in o]
        assert not bare or f"{script} {' '.join(bare)}" in usage
        keys = [o for o in overrides if o not in bare]
        compose([o for o in keys if f"{o.partition('=')[0]}=" not in usage and "," not in o])


def test_the_commands_were_found() -> None:
    for page, least in (("README.md", 10), ("docs/results/coursework.md", 2)):
        assert len([name for name, _ in COMMANDS if name == page]) >= least
    assert {command.split()[0] for page, command in COMMANDS if page == "README.md"} >= {
        "train.py",
        "eval.py",
        "sample.py",
        "report.py",
    }


@pytest.mark.parametrize("page", PAGES)
def test_every_target_of_make_exists(page: str) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", PAGES[page], re.MULTILINE)) <= set(targets)


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_image_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        target, _, heading = link.partition("#")
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), link
        if heading:
            assert heading in map(anchor, re.findall(r"^#+ (.*)", path.read_text(), re.MULTILINE))


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/**/*.svg")), ids=lambda path: path.name)
def test_every_figure_has_a_background_for_light_and_for_dark(path: Path) -> None:
    assert ALONE in path.read_text()
    assert ALONE in Figure("name", "caption", "<svg></svg>").file
    assert "prefers-color-scheme:dark" in ALONE
    assert '<rect class="ground"' in ALONE


def anchor(heading: str) -> str:
    """The anchor that hosting pages make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_choice_is_named() -> None:
    for group in ("attn", "pos", "model", "data", "objective", "tune", "optim", "experiment"):
        for choice in choices_of(group):
            assert f"`{choice}`" in PAGES["docs/choices.md"], f"{group}={choice}"
    for kind in choices_of("eval"):
        assert f"`{kind}`" in PAGES["docs/evaluation.md"], f"eval={kind}"


def test_the_example_scheme_is_a_scheme() -> None:
    code, yaml = (
        re.search(rf"```{kind}\n(.*?)```", README, re.DOTALL)[1] for kind in ("python", "yaml")
    )
    names: dict[str, object] = {}
    exec(code, names)  # noqa: S102
    path = re.search(r"_target_: (\S+)", yaml)[1]
    scheme = names[path.rsplit(".", 1)[1]]
    assert issubclass(scheme, Position)
    assert f"`{path.rsplit('.', 1)[0].replace('.', '/')}.py`" in README


@pytest.mark.parametrize("page", PAGES)
def test_every_key_exists(page: str) -> None:
    """Those of `attn.window`, `optim.lr=X` and `threads=N`, wherever a page names them."""
    groups = ("attn", "pos", "model", "data", "objective", "tune", "optim")
    keys = {g: {k for path in ROOT.glob(f"configs/{g}/*") for k in keys_of(path)} for g in groups}
    plain = {k for path in ROOT.glob("configs/**/*.yaml") for k in keys_of(path)}
    plain |= {*groups, "eval", "experiment"}
    usages = "".join(
        p.read_text() for folder in ("bench", "cli") for p in ROOT.glob(f"{folder}/*.py")
    )
    unknown = []
    for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
        for group, key in re.findall(r"(?<![\w/.])([a-z0-9_]+)\.([a-z0-9_]+)(?==| |$|,)", code):
            if key not in keys.get(group, {key}):
                unknown.append(f"{group}.{key}")
        own = re.findall(r"^([a-z_]+)=", code)
        unknown += [key for key in own if key not in plain and f" [{key}=" not in usages]
    assert not unknown
