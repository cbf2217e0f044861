"""Keep a folder of prepared files that is either whole and right, or made again.

A folder is filled under a temporary name, sealed with a manifest (size and SHA-256 of
each file, and of the manifest itself) and renamed into place. It is checked in full
every time it is opened (about a second a gigabyte), so a truncated or altered file is
never used. Builders of one folder take turns by a file lock; who comes second finds it
done.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmos_jax.errors import DataError
from llmos_jax.ir import fingerprint_of

_MANIFEST = "manifest.json"


def open_or_build(
    folder: Path,
    build: Callable[[Path], dict[str, Any]],
    on_progress: Callable[[str], None],
) -> dict[str, Any]:
    """Return the facts that `build` gave when it filled `folder`, now or long ago.

    Args:
        folder: where the finished files lie.
        build: fills the empty folder that it is given; returns plain data.
        on_progress: told when a damaged folder is made again.
    """
    facts, _ = _open(folder)
    if facts is not None:
        return facts
    with storage(folder), lock(folder):
        facts, damage = _open(folder)
        if facts is not None:
            return facts
        if damage:
            on_progress(f"cache {folder} is damaged ({damage}); making it again")
        room = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(room, ignore_errors=True)  # left by a builder that was killed
        room.mkdir()
        facts = build(room)
        _seal(room, facts)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(room, folder)
        return facts


def _open(folder: Path) -> tuple[dict[str, Any] | None, str | None]:
    """Return (facts, None), or (None, what is wrong; None where there is nothing)."""
    if not folder.exists():
        return None, None
    try:
        manifest = json.loads((folder / _MANIFEST).read_bytes())
        seal = manifest.pop("seal")
        if seal != fingerprint_of(manifest):
            return None, f"{_MANIFEST} was altered"
        for name, (size, sha256) in manifest["files"].items():
            if (folder / name).stat().st_size != size:
                return None, f"{name} has not its size"
            if digest(folder / name) != sha256:
                return None, f"{name} was altered"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return None, f"{type(problem).__name__}: {problem}"
    return manifest["facts"], None


def _seal(room: Path, facts: dict[str, Any]) -> None:
    files = {
        path.name: [path.stat().st_size, digest(path)]
        for path in sorted(room.iterdir())
    }
    manifest = {"facts": facts, "files": files}
    sealed = {**manifest, "seal": fingerprint_of(manifest)}
    (room / _MANIFEST).write_text(json.dumps(sealed, indent=1), encoding="utf-8")


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Take turns with other processes at making `folder`, by a file beside it."""
    with folder.with_name(f"{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def storage(folder: Path) -> Iterator[None]:
    """Make the parent folder; a full or unwritable disk is a DataError, not a crash."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        raise DataError(
            f"prepared text cannot be kept in {folder.parent}: "
            f"{problem.strerror or problem}. Set LLMOS_CACHE to a folder that can be "
            "written and has room."
        ) from None
