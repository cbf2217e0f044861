"""Hold the files of a corpus against its manifest, and remember which were whole."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordReader

from llmos_jax.data.cache import digest, lock, storage
from llmos_jax.errors import DataError
from llmos_jax.ir import fingerprint_of
from llmos_jax.units import format_bytes

_READERS = 4
"""Files hashed at once: a judgement. hashlib lets go of Python's lock."""
_NAMED = 5
"""Damaged files that a message names, of however many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a manifest says of a file."""

    size: int
    sha256: str | None
    """None: not said."""
    num_blocks: int | None = None
    """Of a shard."""


def check_files(
    entry: str,
    files: dict[Path, Expected],
    *,
    cache: Path,
    on_progress: Callable[[str], None],
) -> None:
    """Check every file of the corpus that `entry` names.

    Raises:
        DataError: what is missing, truncated or altered, by name.
    """
    damage = [*filter(None, (_wrong_size(path, said) for path, said in files.items()))]
    if damage:
        raise _damaged(entry, damage)
    key = fingerprint_of(sorted(str(path.resolve()) for path in files))
    memory = cache / "corpora" / f"{key}.json"
    with storage(memory), lock(memory):
        known = _recall(memory)
        stamps = {
            str(path): [*_stamp(path), said.sha256] for path, said in files.items()
        }
        fresh = [path for path in files if known.get(str(path)) != stamps[str(path)]]
        if not fresh:
            return
        total = format_bytes(sum(files[path].size for path in fresh))
        on_progress(f"checking {len(fresh)} files of {entry}, {total}")
        with ThreadPoolExecutor(_READERS) as pool:
            found = pool.map(lambda path: _damage(path, files[path]), fresh)
            damage = [*filter(None, found)]
        if damage:
            raise _damaged(entry, damage)
        _remember(memory, stamps)


def _damaged(entry: str, damage: list[str]) -> DataError:
    more = len(damage) - _NAMED
    named = "; ".join(damage[:_NAMED]) + (f"; and {more} more" if more > 0 else "")
    return DataError(
        f"corpus {entry} is damaged: {named}. Restore them, or delete the folder "
        f"and run tools/prepare again with prepare.out = {entry}."
    )


def _wrong_size(path: Path, said: Expected) -> str | None:
    try:
        found = path.stat().st_size
    except OSError as problem:
        return f"{path.name} is missing ({problem.strerror})"
    if found == said.size:
        return None
    return f"{path.name} has {found} bytes, wanted {said.size}"


def _damage(path: Path, said: Expected) -> str | None:
    try:
        if said.sha256 is not None and digest(path) != said.sha256:
            return f"{path.name} was altered (SHA-256)"
        if said.num_blocks is None:
            return None
        reader = ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (OSError, RuntimeError, ValueError) as problem:
        return f"{path.name} cannot be read ({problem})"
    if found == said.num_blocks:
        return None
    return f"{path.name} has {found} blocks, wanted {said.num_blocks}"


def _stamp(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _recall(memory: Path) -> dict[str, Any]:
    """What was whole; {} where nothing legible is remembered."""
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _remember(memory: Path, stamps: dict[str, Any]) -> None:
    room = memory.with_suffix(".tmp")
    room.write_text(json.dumps(stamps), encoding="utf-8")
    os.replace(room, memory)
