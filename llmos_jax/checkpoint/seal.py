"""Seal a checkpoint: the size and SHA-256 of every file, in a file beside them.

A checkpoint is sealed right after it is committed. Its files are then told from what
was written: cut short, altered, missing, each by name. SHA-256 reads 1.1 GB/s a thread
where the processor has instructions for it (this project's 2-core test machine), and
it needs no library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SEAL = "checksums.json"
_READERS = 4
"""Threads that read and hash, at most: disks and cores are shared; a judgement."""
_BLOCK = 1 << 20


class _Entry(NamedTuple):
    bytes: int
    sha256: str


def seal(folder: Path) -> None:
    """Write the checksums of everything in `folder`; all of them or none.

    Raises:
        OSError: they cannot be read or written; no space, for example.
    """
    names = sorted(_names(folder))
    entries = _measured(folder, names)
    files = {name: entry._asdict() for name, entry in zip(names, entries, strict=True)}
    page = {"files": files, "sha256": _digest_of_page(files)}
    fresh = folder / f"{SEAL}.tmp"
    try:
        with fresh.open("w", encoding="utf-8") as file:
            json.dump(page, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(folder / SEAL)
    finally:
        fresh.unlink(missing_ok=True)


def is_sealed(folder: Path) -> bool:
    """Whether a checkpoint has checksums."""
    return (folder / SEAL).is_file()


def size_faults(folder: Path) -> list[str]:
    """What is missing or of another size than was sealed; reads no array.

    Empty where all is well, and where nothing was sealed.
    """
    try:
        sealed = _sealed(folder)
    except ValueError as problem:
        return [str(problem)]
    found = (_size_fault(folder, name, entry) for name, entry in sealed.items())
    return [fault for fault in found if fault]


def faults(folder: Path) -> list[str]:
    """What is missing, cut short or altered, as `FILE ...`; reads every byte."""
    try:
        sealed = _sealed(folder)
    except ValueError as problem:
        return [str(problem)]
    wrong = {name: _size_fault(folder, name, entry) for name, entry in sealed.items()}
    same = [name for name, fault in wrong.items() if fault is None]
    for name, now in zip(same, _measured(folder, same), strict=True):
        if now.sha256 != sealed[name].sha256:
            wrong[name] = f"{name} was altered"
    return [fault for _, fault in sorted(wrong.items()) if fault is not None]


def num_bytes(folder: Path) -> int:
    """Bytes of all files of a checkpoint."""
    return sum((folder / name).stat().st_size for name in _names(folder))


def _names(folder: Path) -> Iterator[str]:
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in (SEAL, f"{SEAL}.tmp"):
            yield path.relative_to(folder).as_posix()


def _sealed(folder: Path) -> dict[str, _Entry]:
    """The checksums of a checkpoint; none if it was not sealed.

    Raises:
        ValueError: they are damaged themselves.
    """
    if not is_sealed(folder):
        return {}
    try:
        page = json.loads((folder / SEAL).read_bytes())
        whole = page["sha256"] == _digest_of_page(page["files"])
        entries = {name: _Entry(**entry) for name, entry in page["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        whole, entries = False, {}
    if not whole:
        raise ValueError(f"{SEAL} was altered")
    return entries


def _size_fault(folder: Path, name: str, entry: _Entry) -> str | None:
    try:
        size = (folder / name).stat().st_size
    except OSError:
        return f"{name} is missing"
    if size == entry.bytes:
        return None
    how = "is cut short: it" if size < entry.bytes else "was altered: it"
    return f"{name} {how} has {size:,} bytes and was written with {entry.bytes:,}"


def _measured(folder: Path, names: list[str]) -> list[_Entry]:
    with ThreadPoolExecutor(min(_READERS, os.cpu_count() or 1)) as readers:
        return list(readers.map(lambda name: _measure(folder / name), names))


def _measure(path: Path) -> _Entry:
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(_BLOCK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            size += count
    return _Entry(size, digest.hexdigest())


def _digest_of_page(files: Mapping[str, object]) -> str:
    text = json.dumps(files, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
