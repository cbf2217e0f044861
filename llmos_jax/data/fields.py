"""Find what rows of a file are asked for, and say what is there where it is not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from llmos_jax.errors import DataError, did_you_mean

_LONGEST_NAME = 60  # of a first row that is no header a field may be a whole text


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A column or field that a setting names."""

    key: str
    setting: str
    """The setting that names it: data.text_key."""
    holds: str = "text"
    """What it holds, in a word, for messages."""
    is_needed: bool = True
    """Whether a file without it is refused."""


def text_field(key: str) -> Field:
    """Return the field that `data.text_key` names."""
    return Field(key=key, setting="data.text_key")


def absent(
    place: str, kind: str, fields: Sequence[Field], names: Collection[str]
) -> DataError | None:
    """Return the error for a row or table (`kind`: field, column) without a field that
    is needed; None where all are there."""
    missing = [one for one in fields if one.is_needed and one.key not in names]
    if not missing:
        return None
    if len(missing) > 1:
        keys = f" and no {kind} ".join(repr(field.key) for field in missing)
        settings = " and ".join(field.setting for field in missing)
        held = " and the ".join(field.holds for field in missing)
        is_table = kind == "column"
        first = " that the first line names" if is_table else ""
        plain = ", or name the file .txt if its lines are `label text`"
        return DataError(
            f"{place}: no {kind} {keys}; the {kind}s{first} are {listed(names)}. Set "
            f"{settings} to those that hold the {held}{plain if is_table else ''}."
        )
    field = missing[0]
    others = [name for name in names if name not in {one.key for one in fields}]
    hint = near(field.key, others)
    if not hint and len(fields) > 1 and len(others) == 1:
        hint = f" Did you mean {others[0]!r}?"
    return DataError(
        f"{place}: no {kind} {field.key!r}; the {kind}s are {listed(names)}.{hint} "
        f"Set {field.setting} to the one that holds the {field.holds}."
    )


def listed(names: Iterable[str]) -> str:
    """Return names in quotes, or `none`."""
    shown = (
        name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
        for name in names
    )
    return ", ".join(repr(name) for name in shown) or "none"


def near(word: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` where a name is near; else nothing."""
    hint = did_you_mean(word, names)
    return hint if hint.startswith(" Did") else ""


def json_kind(value: object) -> str:
    """Name the kind of a JSON value, for messages."""
    names = {dict: "JSON object", list: "list", str: "text", bool: "truth value"}
    return names.get(type(value), "null" if value is None else "number")
