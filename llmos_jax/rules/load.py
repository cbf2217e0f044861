"""Turn a file of sharding_rules/ into Rules, and say where in the file a rule stands.

The only opener of that folder. A file is closed: every name is in axes.toml, every mesh
axis is one of the six and has its line under [mesh]; what is wrong is a RuleError that
gives the file and the line.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from llmos_jax.errors import RuleError, did_you_mean
from llmos_jax.ir.rules import MESH_AXES, Rules
from llmos_jax.ir.workload import Phase
from llmos_jax.places import data_folder

FOLDER = "sharding_rules"
_TOP_LEVEL = ("family", "inherit", "uneven", "mesh", "weights", "activations", "decode")
_SECTIONS = ("weights", "activations")
_UNEVEN = ("error", "replicate")

Table = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One word of the vocabulary."""

    name: str
    letter: str
    meaning: str


@cache
def load_axes() -> dict[str, Axis]:
    """Return the vocabulary: every logical axis by name."""
    entries = _read(f"{FOLDER}/axes.toml")["axes"]
    return {
        name: Axis(name=name, letter=entry["letter"], meaning=entry["meaning"])
        for name, entry in entries.items()
    }


def load_rules(name_or_path: str | Path, phase: Phase = "train") -> Rules:
    """Return the Rules of a name under sharding_rules/ or of a path ending in .toml.

    Args:
        name_or_path: `llama`, or a file of one's own.
        phase: For `decode`, what the file says under [decode] is laid over the rest.

    Raises:
        RuleError: no such file, or a file that breaks a law of
        sharding_rules/README.md.
    """
    source = _source_of(str(name_or_path))
    table = _merged(source)
    family, uneven = table.get("family"), table.get("uneven", "error")
    if not isinstance(family, str):
        raise RuleError(f'{source}: needs family = "..." at the top.')
    if uneven not in _UNEVEN:
        _fail(source, "", "uneven", f"uneven = {uneven!r}; say 'error' or 'replicate'.")
    for section in _SECTIONS:
        if section not in table:
            raise RuleError(f"{source}: the section [{section}] is missing.")
    _check_mesh(source, table)
    overrides = table.get("decode", {}) if phase == "decode" else {}
    laid = {part: {**table[part], **overrides.get(part, {})} for part in _SECTIONS}
    return Rules(
        family=family,
        weights={name: tuple(axes) for name, axes in laid["weights"].items()},
        activations={name: tuple(axes) for name, axes in laid["activations"].items()},
        uneven=uneven,
        repeat=tuple(overrides.get("repeat", ())),
        source=source,
    )


def locate(source: str, section: str, key: str = "") -> str:
    """Return `file:line` of a section's entry (or of its head), or the file alone."""
    path = _path_of(source)
    if not path.is_file():
        return source or "the rules"
    here, head = "", ""
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if match := re.match(r"\s*\[([\w.]+)\]", line):
            here = match[1]
            head = f"{source}:{number}" if here == section else head
        elif (
            key and here == section and re.match(rf'\s*"?{re.escape(key)}"?\s*=', line)
        ):
            return f"{source}:{number}"
    base = _read(source).get("inherit") if key else None
    if isinstance(base, str):
        return locate(_source_of(base), section, key)
    return head or source


def _merged(source: str) -> Table:
    """The file over the one it inherits from, entry by entry."""
    table = _checked(source)
    if "inherit" not in table:
        return table
    below = _source_of(str(table["inherit"]))
    base = _checked(below)
    if "inherit" in base:
        raise RuleError(
            f"{locate(source, '', 'inherit')}: inherits from {below}, which itself "
            f"inherits from {base['inherit']!r}; one level is all there is."
        )
    merged = {**base, **table}
    for part in ("mesh", *_SECTIONS):
        merged[part] = {**base.get(part, {}), **table.get(part, {})}
    return merged


def _checked(source: str) -> Table:
    """The file as TOML, its words checked one by one."""
    table = _read(source)
    for key in table:
        if key not in _TOP_LEVEL:
            hint = did_you_mean(key, _TOP_LEVEL)
            _fail(source, "", key, f"unknown key {key!r}.{hint}")
    for part in _SECTIONS:
        _check_section(source, part, table.get(part, {}))
    for part, entries in table.get("decode", {}).items():
        if part == "repeat":
            _check_section(source, "decode", dict.fromkeys(entries, []))
            continue
        if part not in _SECTIONS:
            hint = did_you_mean(part, _SECTIONS)
            _fail(
                source, f"decode.{part}", "", f"unknown section [decode.{part}].{hint}"
            )
        _check_section(source, f"decode.{part}", entries)
    return table


def _check_section(source: str, section: str, entries: Table) -> None:
    words = load_axes()
    for name, axes in entries.items():
        if name not in words:
            hint = did_you_mean(name, words)
            _fail(source, section, name, f"unknown logical axis {name!r}.{hint}")
        if not isinstance(axes, list) or not all(isinstance(x, str) for x in axes):
            _fail(source, section, name, f'{name} takes a list, as in ["fsdp"] or [].')
        for axis in axes:
            if axis not in MESH_AXES:
                hint = did_you_mean(axis, MESH_AXES)
                _fail(source, section, name, f"{name}: no mesh axis {axis!r}.{hint}")
        if len(set(axes)) < len(axes):
            _fail(source, section, name, f"{name}: a mesh axis is listed twice.")


def _check_mesh(source: str, table: Table) -> None:
    """Every mesh axis that is used has its line under [mesh], and no other."""
    told = table.get("mesh", {})
    decode = table.get("decode", {})
    parts = [table[part] for part in _SECTIONS]
    parts += [decode[part] for part in _SECTIONS if part in decode]
    used = {axis for part in parts for axes in part.values() for axis in axes}
    for axis in sorted(used - set(told)):
        raise RuleError(
            f"{locate(source, 'mesh')}: mesh axis {axis!r} is used but [mesh] does not "
            f'say what it carries; add {axis} = "...".'
        )
    for axis in told:
        if axis not in MESH_AXES:
            hint = did_you_mean(axis, MESH_AXES)
            _fail(source, "mesh", axis, f"no mesh axis {axis!r}.{hint}")
        if axis not in used:
            _fail(source, "mesh", axis, f"no rule uses mesh axis {axis!r}; remove it.")


def _fail(source: str, section: str, key: str, problem: str) -> NoReturn:
    raise RuleError(f"{locate(source, section, key)}: {problem}")


def _source_of(name_or_path: str) -> str:
    """The file's name as people see it: `sharding_rules/NAME.toml`, or their path."""
    if name_or_path.endswith(".toml"):
        if not _path_of(name_or_path).is_file():
            raise RuleError(f"there is no rules file {name_or_path}.")
        return name_or_path
    known = [path.stem for path in data_folder(FOLDER).glob("*.toml")]
    known = [stem for stem in known if stem != "axes"]
    if name_or_path not in known:
        raise RuleError(
            f"there are no rules {name_or_path!r} under {FOLDER}/."
            f"{did_you_mean(name_or_path, known)} A file of your own ends in .toml."
        )
    return f"{FOLDER}/{name_or_path}.toml"


def _path_of(source: str) -> Path:
    if Path(source).parent == Path(FOLDER):
        return data_folder(FOLDER) / Path(source).name
    return Path(source)


def _read(source: str) -> Table:
    try:
        return tomllib.loads(_path_of(source).read_text())
    except tomllib.TOMLDecodeError as problem:
        raise RuleError(f"{source} is not TOML: {problem}") from None
