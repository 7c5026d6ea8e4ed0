"""Command line to plain config: Hydra composes it, one line says what is wrong with it."""

import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from train.config.schema import Config, suggest

PROBES = "data.probes."  # modules of data whose rows objective=probe reads
CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def compose(overrides: list[str], *, door: str = "train") -> Config:
    """The resolved config of one run: the door's YAML, its groups, then the overrides.

    `config["choices"]` holds the name chosen in each group. Raises ValueError, in one line that
    names what would work, for anything that does not compose.
    """
    asked = parse(overrides)
    keys = {override.key_or_group for override in asked}
    if "data.path" in keys and "data" not in keys:
        asked = parse([*overrides, "data=text"])  # a path is of one's own text
    for override in asked:
        check_choice(override)
    chosen = [override for override in asked if is_group(override.key_or_group)]
    values = [override for override in asked if not is_group(override.key_or_group)]
    try:
        lines = [str(override.input_line) for override in chosen]
        composed, choices = composed_by_hydra(CONFIGS, door, *lines)
        if "objective" not in keys and str(composed.get("data", {}).get("_target_")).startswith(
            PROBES
        ):
            composed, choices = composed_by_hydra(CONFIGS, door, *lines, "objective=probe")
        composed = composed.copy()
        base = OmegaConf.to_container(composed)
        for override in values:
            check_key(override, base)
            OmegaConf.update(composed, override.key_or_group, override.value())
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ValueError(f"{missing[0]} has no value yet: give {missing[0]}=...")
        plain = cast(Config, OmegaConf.to_container(composed, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(" ".join(str(error).split())) from error
    return {**plain, "choices": {k: v for k, v in choices.items() if is_group(k) and v is not None}}


@functools.lru_cache(maxsize=1024)
def composed_by_hydra(folder: Path, door: str, *lines: str) -> tuple[Any, dict[str, Any]]:
    """A door's config with the chosen groups, unresolved, and the choices. Kept: it takes 60 ms, and a
    sweep asks for each several times."""
    with initialize_config_dir(str(folder), version_base="1.3"):
        composed = hydra_compose(door, list(lines), return_hydra_config=True)
    with open_dict(composed):
        choices = dict(composed.pop("hydra").runtime.choices)
    return composed, choices


def expand(overrides: list[str]) -> Iterator[list[str]]:
    """The cells of a sweep: every combination of the values that the overrides list."""
    columns = []
    for override in parse(overrides):
        key, value = override.get_key_element(), override.value()
        if isinstance(value, Glob):
            values = iter(value.filter(choices_of(override.key_or_group)))
        elif override.is_sweep_override():
            values = override.sweep_string_iterator()
        else:
            values = iter([override.get_value_element_as_str()])
        columns.append([f"{key}={value}" for value in values])
    for cell in itertools.product(*columns):
        yield list(cell)


def parse(overrides: list[str]) -> list[Override]:
    """Parsed overrides. A value that Hydra's grammar has no form for, as `f(x)`, is taken as text.

    Raises ValueError for what is no KEY=VALUE.
    """
    return [parsed(text) for text in overrides]


@functools.lru_cache(maxsize=4096)
def parsed(text: str) -> Override:
    """One parsed override; kept, as a sweep asks for each many times."""
    key, equals, value = text.partition("=")
    if not equals and not text.startswith("~"):
        raise ValueError(f"{text}: write KEY=VALUE, as in attn=gqa (see --help)")
    parser = OverridesParser.create()
    try:
        return parser.parse_override(text)
    except HydraException:
        try:
            return parser.parse_override(f"{key}={quoted(value)}")
        except HydraException as error:
            raise ValueError(f"{text}: {' '.join(str(error).split())}") from error


def quoted(text: str) -> str:
    """A text as a Hydra value, whatever characters it holds."""
    return str(QuotedString(text, Quote.single).with_quotes())


def group_of(key: str) -> str:
    """attn of attn.n_kv_heads and of attn@attn.global."""
    return re.split("[.@]", key)[0]


def keys_set(overrides: list[str]) -> set[str]:
    """The keys and groups that overrides set."""
    return {override.get_key_element().lstrip("+") for override in parse(overrides)}


def is_group(name: str) -> bool:
    return bool(re.fullmatch(r"[a-z]+", name)) and (CONFIGS / name).is_dir()


def choices_of(group: str) -> list[str]:
    """The choices of a group: its YAML files, those in folders as 'folder/name'."""
    folder = CONFIGS / group
    return sorted(p.relative_to(folder).with_suffix("").as_posix() for p in folder.rglob("*.yaml"))


def check_choice(override: Override) -> None:
    """Raise ValueError if an override picks a choice that does not exist, or removes anything."""
    group, value = override.key_or_group, override.value()
    if override.is_delete():
        raise ValueError(f"{override.input_line}: {group} cannot be left out")
    if override.is_sweep_override():
        raise ValueError(
            f"{override.input_line}: several values need -m; a text with commas needs quotes, as in "
            f"\"{group}='a,b'\""
        )
    if is_group(group) and value is not None and value not in choices_of(group):
        raise ValueError(
            f"{group}={value}: no such choice; {suggest(str(value), choices_of(group))}"
        )


def check_key(override: Override, base: Any) -> None:
    """Raise ValueError if an override sets a key that the composed config does not have."""
    node, path = base, override.key_or_group.split(".")
    for depth, key in enumerate(path):
        if not isinstance(node, dict) or key not in node:
            keys = [k for k in node if not k.startswith("_")] if isinstance(node, dict) else []
            where = ".".join(path[: depth + 1])
            if others := having(path[0], key) if depth == 1 else []:
                verb = "has" if len(others) == 1 else "have"
                raise ValueError(f"{where}: no such key here; {', '.join(others)} {verb} it")
            if not keys:
                raise ValueError(f"{where}: no such key; {'.'.join(path[:depth])} has none")
            prefix = "".join(f"{p}." for p in path[:depth])
            raise ValueError(f"{where}: no such key; {suggest(key, keys, prefix)}")
        node = node[key]


def having(group: str, key: str) -> list[str]:
    """The choices of a group that have a key: ['attn=gqa']."""
    if not is_group(group):
        return []
    return [
        f"{group}={c}" for c in choices_of(group) if key in keys_of(CONFIGS / group / f"{c}.yaml")
    ]


def keys_of(path: Path) -> list[str]:
    """The keys that a YAML file sets at its top level."""
    return re.findall(r"^(?!defaults:)([a-z]\w*):", path.read_text(), re.MULTILINE)
