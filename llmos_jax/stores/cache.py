"""Keep local copies of objects: fetched once, checked, evicted when room is short.

`objects/<digest of url, size and ETag>/` holds the file under its own name, and its
facts with the SHA-256. It is filled under a temporary name and renamed, by one process
at a time. Its checksum is compared when a process first asks for it (about a second a
gigabyte). What a living process has asked for and not released is never evicted: each
process lists its copies in `users/`, in a file that it keeps locked, so that the kernel
lets go when it dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llmos_jax.errors import StoreError
from llmos_jax.places import cache_folder
from llmos_jax.stores.digests import sha256_of
from llmos_jax.stores.fetch import Remote, fetch_to
from llmos_jax.stores.objects import missing, stat
from llmos_jax.stores.patience import above_0
from llmos_jax.units import format_bytes

# A judgement: room for a few corpora, and never more than half of a disk that others
# use too.
DEFAULT_LIMIT_BYTES = 50 * 2**30

_FACTS = "facts.json"

# What this process uses, by (process, cache folder): a fork starts its own list.
_users: dict[tuple[int, Path], tuple[TextIO, set[str]]] = {}
_checked: set[tuple[Path, int, int]] = set()


def local_copy(remote: Remote | str) -> Path:
    """Return a verified local file with the content of an object, fetched if need be.

    It stays until this process ends or gives it to `release`. Fetch before forking:
    the library's threads do not survive a fork.

    Raises:
        StoreError: no such object, no answer, damaged for good, or no room.
    """
    if isinstance(remote, str):
        found = stat(remote)
        if found is None:
            raise missing(remote)
        remote = found
    root = cache_folder() / "objects"
    name = _name(remote)
    file = root / name / remote.url.rpartition("/")[2]
    with _storage(root, remote), _locked(root / "locks" / name):
        _use(root, name)
        if not _is_whole(file, remote):
            shutil.rmtree(file.parent, ignore_errors=True)
            _make_room(root, remote)
            _fill(root, file, remote)
        os.utime(file.parent / _FACTS)
        _checked.add(_mark(file))
    return file


def release(path: Path) -> None:
    """Say that a local copy is not read any more by this process; it may be evicted."""
    root, name = path.parent.parent, path.parent.name
    kept = _users.get((os.getpid(), root))
    if kept is None or name not in kept[1]:
        return
    with _locked(root / "lock"):
        file, names = kept
        names.discard(name)
        file.seek(0)
        file.truncate()
        file.write("".join(f"{each}\n" for each in sorted(names)))
        file.flush()


def limit_bytes(root: Path) -> int:
    """Return how much the cache may hold.

    Raises:
        StoreError: LLMOS_CACHE_GIB is not a number above 0.
    """
    gib = above_0(
        "LLMOS_CACHE_GIB",
        f"GiB for copies of remote files, above 0; {DEFAULT_LIMIT_BYTES >> 30} or half "
        "of the free disk if unset",
    )
    if gib is None:
        free = shutil.disk_usage(root).free + _held(root)
        return min(DEFAULT_LIMIT_BYTES, free // 2)
    return int(gib * 2**30)


def _name(remote: Remote) -> str:
    what = json.dumps([remote.url, remote.size, remote.etag or str(remote.modified)])
    return hashlib.sha256(what.encode()).hexdigest()[:32]


def _mark(file: Path) -> tuple[Path, int, int]:
    facts = file.stat()
    return file, facts.st_ino, facts.st_mtime_ns


def _is_whole(file: Path, remote: Remote) -> bool:
    try:
        if file.stat().st_size != remote.size:
            return False
        facts = json.loads((file.parent / _FACTS).read_bytes())
        if _mark(file) in _checked:
            return True
        with file.open("rb") as opened:
            return bool(facts["sha256"] == sha256_of(opened))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _fill(root: Path, file: Path, remote: Remote) -> None:
    room = root / f"{file.parent.name}.tmp"
    shutil.rmtree(room, ignore_errors=True)  # left by a process that was killed
    room.mkdir()
    try:
        sha256 = fetch_to(remote, room / file.name)
        (room / file.name).chmod(0o444)
        facts = {
            "url": remote.url,
            "size": remote.size,
            "etag": remote.etag,
            "modified": remote.modified.isoformat(),
            "sha256": sha256,
        }
        (room / _FACTS).write_text(json.dumps(facts, indent=1), encoding="utf-8")
        room.rename(file.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _use(root: Path, name: str) -> None:
    with _locked(root / "lock"):
        who = (os.getpid(), root)
        if who not in _users or not Path(_users[who][0].name).exists():
            folder = root / "users"
            folder.mkdir(exist_ok=True)
            opened = (folder / f"{os.getpid()}-{os.urandom(4).hex()}").open("w")
            fcntl.flock(opened, fcntl.LOCK_EX)
            _users[who] = (opened, set())
        file, names = _users[who]
        if name not in names:
            names.add(name)
            file.write(f"{name}\n")
            file.flush()


def _make_room(root: Path, remote: Remote) -> None:
    """Evict what was used longest ago, until `remote` fits; never what is in use."""
    with _locked(root / "lock"):
        limit = limit_bytes(root)
        used = _used_names(root)
        entries = sorted(
            (facts.stat().st_mtime_ns, facts.parent)
            for facts in root.glob(f"*/{_FACTS}")
        )
        for _, entry in entries:
            if _held(root) + remote.size <= limit:
                break
            if entry.name not in used:
                shutil.rmtree(entry, ignore_errors=True)
        free = shutil.disk_usage(root).free
    if free < remote.size:
        raise StoreError(
            f"no room for {remote.url} in {root}: {format_bytes(remote.size)} wanted, "
            f"{format_bytes(free)} free. Free some, or set LLMOS_CACHE to another disk."
        )


def _used_names(root: Path) -> set[str]:
    """Return what living processes use, and forget the dead ones."""
    used: set[str] = set()
    for path in (root / "users").iterdir():
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                used.update(file.read().split())
    return used


def _held(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except FileNotFoundError:  # another process has finished or evicted it
                continue
    return total


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _storage(root: Path, remote: Remote) -> Iterator[None]:
    """Make the cache; a full or unwritable disk is a StoreError, not a crash."""
    try:
        (root / "locks").mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        raise StoreError(
            f"{remote.url} cannot be kept in {root}: {problem.strerror or problem}. "
            "Set LLMOS_CACHE to a folder that can be written and has room."
        ) from problem
