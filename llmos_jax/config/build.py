"""Turn plain tables into frozen dataclasses, and back into TOML, with exact errors.

The schema is the dataclass: this file walks its fields, so a new field needs nothing
here.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, TypeVar

import msgspec

from llmos_jax.errors import ConfigError, did_you_mean

T = TypeVar("T")


def build(cls: type[T], table: dict[str, Any], source: str, prefix: str = "") -> T:
    """Make a `cls` from a table of plain values.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing required
            key, or a value of the wrong type; each with its dotted name and `source`.
    """
    known = keys_of(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in known:
            hint = did_you_mean(key, known)
            raise ConfigError(f"{source}: unknown key {prefix + key!r}.{hint}")
        name, hint_type = known[key]
        values[name] = _value(hint_type, value, source, prefix + key)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and field.name not in values:
            key = prefix + field.metadata.get("key", field.name)
            raise ConfigError(
                f"{source}: {key!r} is required and missing. "
                f"Write it in the file or pass `--set {key}=...`."
            )
    return cls(**values)


def keys_of(cls: type) -> dict[str, tuple[str, Any]]:
    """Key in the file -> (field name, type) of a section's dataclass."""
    hints = typing.get_type_hints(cls)
    return {
        field.metadata.get("key", field.name): (field.name, hints[field.name])
        for field in dataclasses.fields(cls)
    }


def section_type(hint: Any) -> type | None:
    """The dataclass a type hint holds, or None for a plain value."""
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option) and isinstance(option, type):
            return option
    return None


def to_table(section: Any) -> dict[str, Any]:
    """Plain values of a dataclass under their names in the file; None is left out."""
    table: dict[str, Any] = {}
    for key, (name, _) in keys_of(type(section)).items():
        value = getattr(section, name)
        if value is None:
            continue
        table[key] = to_table(value) if dataclasses.is_dataclass(value) else value
    return table


def to_toml(section: Any) -> str:
    """The fully expanded TOML of a config: reading it gives the config back."""
    return "\n".join(_lines(to_table(section), ())) + "\n"


def _lines(table: dict[str, Any], path: tuple[str, ...]) -> list[str]:
    plain = [f"{k} = {_toml(v)}" for k, v in table.items() if not isinstance(v, dict)]
    lines = [f"\n[{'.'.join(path)}]", *plain] if path else plain
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _lines(value, (*path, key))
    return lines


def _toml(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (bool, str)):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _value(hint: Any, value: Any, source: str, key: str) -> Any:
    section = section_type(hint)
    if section is not None and isinstance(value, dict):
        return build(section, value, source, key + ".")
    try:
        return msgspec.convert(value, hint)
    except msgspec.ValidationError as problem:
        choices = _choices(hint)
        if choices and isinstance(value, str):
            raise ConfigError(
                f"{source}: {key} = {_toml(value)} is not one of {', '.join(choices)}."
            ) from None
        raise ConfigError(
            f"{source}: {key} = {_toml(value)} has the wrong type: "
            f"{_plain(str(problem))}."
        ) from None


def _choices(hint: Any) -> list[str]:
    options = (hint, *typing.get_args(hint))
    literals = [o for o in options if typing.get_origin(o) is typing.Literal]
    return [str(choice) for o in literals for choice in typing.get_args(o)]


def _plain(problem: str) -> str:
    """msgspec's text with its type names as TOML calls them."""
    return problem.replace("`str`", "text").replace("`", "").replace(" - at $", ", at ")
