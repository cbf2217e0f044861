"""Lay `--set key=value` over a config table, typed by the schema.

The value is read as TOML where it is TOML (`3`, `1e-3`, `true`, `["a", "b"]`) and as
text where the schema wants text, so no quoting is needed for names and paths.
"""

from __future__ import annotations

import copy
import tomllib
import typing
from collections.abc import Sequence
from typing import Any

from llmos_jax.config.build import keys_of, section_type
from llmos_jax.errors import ConfigError, did_you_mean


def apply_overrides(
    table: dict[str, Any], overrides: Sequence[str], schema: type
) -> dict[str, Any]:
    """Return a copy of `table` with each `dotted.key=value` laid over it.

    Raises:
        ConfigError: no `=`, or a key that the schema does not have.
    """
    result = copy.deepcopy(table)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {override!r} is not of the form key=value, "
                "for example `--set train.steps=100`."
            )
        _lay(result, key.strip(), text.strip(), schema)
    return result


def _lay(table: dict[str, Any], dotted: str, text: str, schema: type) -> None:
    parts = dotted.split(".")
    section: type | None = schema
    for depth, part in enumerate(parts):
        hint: Any = int
        if section is not None:
            known = keys_of(section)
            if part not in known:
                seen = ".".join([*parts[:depth], part])
                raise ConfigError(
                    f"--set {dotted}: unknown key {seen!r}.{did_you_mean(part, known)}"
                )
            hint = known[part][1]
        if depth == len(parts) - 1:
            table[part] = _read_value(text, hint)
            return
        inner = section_type(hint)
        if inner is None and not _is_table(hint):
            raise ConfigError(
                f"--set {dotted}: {'.'.join(parts[: depth + 1])} is a value, "
                "not a section."
            )
        section = inner
        if not isinstance(table.get(part), dict):
            table[part] = {}
        table = table[part]


def _is_table(hint: Any) -> bool:
    return dict in {typing.get_origin(o) for o in (hint, *typing.get_args(hint))}


def _read_value(text: str, hint: Any) -> Any:
    options = typing.get_args(hint) if _is_union(hint) else (hint,)
    wants_text = str in options
    wants_list = any(typing.get_origin(option) is tuple for option in options)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    if wants_text and not isinstance(value, str):
        return text
    if wants_list and not isinstance(value, list):
        return [value if isinstance(value, str) else text]
    return value


def _is_union(hint: Any) -> bool:
    import types

    return typing.get_origin(hint) in (typing.Union, types.UnionType)
