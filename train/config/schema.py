"""Constructors as the schema of a config: keyword-only arguments, checked by type."""

import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

T = TypeVar("T")
Config = dict[str, Any]  # plain JSON: nested dicts of str, int, float, bool, list and None


def suggest(wrong: str, right: Collection[str], prefix: str = "") -> str:
    """'did you mean n_heads? (choices: ...)', for an error message."""
    close = difflib.get_close_matches(wrong, right, n=1)
    listed = ", ".join(prefix + name for name in sorted(right))
    return f"did you mean {prefix}{close[0]}? (known: {listed})" if close else f"known: {listed}"


def choose(where: str, name: str, table: Mapping[str, T]) -> T:
    """What a name stands for. Raises ValueError, listing the names that exist."""
    if name not in table:
        raise ValueError(f"{where}={name}: no such choice; {suggest(str(name), table)}")
    return table[name]


def arguments(
    where: str, node: Config, *takers: Callable[..., Any], given: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Split a config node among constructors: the keyword-only arguments of each, checked by type.

    The constructors are the schema. `given` are arguments that code supplies. Raises ValueError,
    naming the key, for keys that nobody takes, missing ones, and values of a wrong type.
    """
    if not isinstance(node, dict):
        raise ValueError(f"{where}={node} is not a group of keys")
    wanted = [keyword_types(taker, given) for taker in takers]
    known = {name for names in wanted for name in names}
    for key in node:
        if key != "_target_" and key not in known:
            prefix = f"{where}." if where else ""
            raise ValueError(f"{prefix}{key}: no such key; {suggest(key, known, prefix)}")
    return [
        {
            name: convert(f"{where}.{name}".lstrip("."), node, name, hint)
            for name, hint in names.items()
        }
        for names in wanted
    ]


def keyword_types(taker: Callable[..., Any], given: Collection[str]) -> dict[str, Any]:
    """Names and types of the keyword-only parameters of a class or function."""
    function = taker.__init__ if isinstance(taker, type) else taker  # type: ignore[misc]
    hints = typing.get_type_hints(function)
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: hints[p.name]
        for p in parameters
        if p.kind == p.KEYWORD_ONLY and p.name not in given
    }


def convert(where: str, node: Config, name: str, hint: Any) -> Any:
    """A node's value as the type asked for: 1e3 is an int, 1 is a float, nothing else bends."""
    if name not in node:
        raise ValueError(f"{where} is missing")
    value = node[name]
    if fits(value, hint):
        return value
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if typing.get_origin(kind) is list and isinstance(value, list):
            (inner,) = typing.get_args(kind)
            return [convert(where, {name: item}, name, inner) for item in value]
    if int in kinds and isinstance(value, float) and value.is_integer():
        return int(value)
    if float in kinds and type(value) is int:
        return float(value)
    if str in kinds and type(value) in (int, float):
        return str(value)
    wanted = [PLAIN.get(typing.get_origin(kind) or kind, "a list") for kind in kinds]
    raise ValueError(f"{where}={value} is not {' or '.join(wanted)}")


PLAIN = {
    int: "a whole number",
    float: "a finite number",
    bool: "true or false",
    str: "a text",
    dict: "a group of keys",
    types.NoneType: "null",
}


def fits(value: Any, hint: Any) -> bool:
    if isinstance(hint, types.UnionType):
        return any(fits(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (kind,) = typing.get_args(hint)
        return isinstance(value, list) and all(fits(item, kind) for item in value)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict)
    if hint is float:
        return type(value) is float and math.isfinite(value)
    return type(value) is hint


def at_least(least: int, options: object, *names: str, where: str = "") -> None:
    """Raise ValueError for the first of these options below `least`; None means that none is set."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{where}{name}={value} must be at least {least}")
