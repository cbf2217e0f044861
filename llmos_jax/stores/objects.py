"""List, read, write and delete objects; each operation is whole or raises StoreError.

A written object is checked against what the store says it holds (its ETag, where that
is a digest), and carries its own SHA-256 as metadata for later readers.
"""

from __future__ import annotations

import hashlib
import io
import re
from concurrent.futures import ThreadPoolExecutor
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import obstore

from llmos_jax.errors import StoreError
from llmos_jax.stores.address import Address
from llmos_jax.stores.connect import Store, connect, endpoint
from llmos_jax.stores.digests import is_opaque, make_opaque, matches_etag, sha256_of
from llmos_jax.stores.fetch import PART_BYTES, SHA256, WORKERS, Remote, fetch
from llmos_jax.stores.patience import Refetch, persist

if TYPE_CHECKING:
    from obstore import ObjectMeta


def list_files(url: str) -> list[Remote]:
    """List an object, a folder with all that is below it, or a glob; by name.

    In a glob `*` and `?` stay within one step of the path, and `**/` is any folders.
    Folder markers (empty objects whose name ends in a slash) are left out.

    Raises:
        StoreError: nothing is there, or the store cannot be read.
    """
    address = Address.parse(url)
    if re.search(r"[*?\[]", address.key):
        fixed = re.split(r"[*?\[]", address.key, maxsplit=1)[0].rpartition("/")[0]
        pattern = re.compile(_glob(address.key))
        found = [
            remote
            for remote in _below(address.at(fixed))
            if pattern.fullmatch(Address.parse(remote.url).key)
        ]
    elif address.key and not address.key.endswith("/"):
        one = stat(url)
        found = [one] if one else _below(address)
    else:
        found = _below(address)
    if not found:
        raise StoreError(
            f"nothing is at {url} ({endpoint(address)}). Wanted an object, a folder or "
            "a glob that matches."
        )
    return found


def list_names(url: str) -> list[str]:
    """Names directly below a folder, sorted; folders end in `/`. Empty if none."""
    address = Address.parse(url)
    store = connect(address)
    prefix = address.key.strip("/")

    def operation() -> list[str]:
        page = obstore.list_with_delimiter(store, prefix or None)
        folders = [f"{_last(str(name))}/" for name in page["common_prefixes"]]
        return sorted(folders + [_last(meta["path"]) for meta in page["objects"]])

    return persist(url, endpoint(address), operation)


def stat(url: str) -> Remote | None:
    """Return what an object is, or None if there is none of this name."""
    address = Address.parse(url)
    store = connect(address)
    try:
        meta = persist(url, endpoint(address), lambda: obstore.head(store, address.key))
    except FileNotFoundError:
        return None
    return _remote(address, meta)


def exists(url: str) -> bool:
    """Whether an object of this name, or any below it, is there."""
    address = Address.parse(url)
    if address.key and not address.key.endswith("/") and stat(url):
        return True
    store = connect(address)

    def operation() -> bool:
        prefix = address.key.strip("/") or None
        return any(list(page) for page in obstore.list(store, prefix, chunk_size=1))

    return persist(url, endpoint(address), operation)


def read_bytes(url: str) -> bytes:
    """Read a whole object that fits in memory; it is checked as `fetch` checks."""
    file = io.BytesIO()
    remote = stat(url)
    if remote is None:
        raise missing(url)
    fetch(remote, file)
    return file.getvalue()


def write_bytes(url: str, data: bytes) -> None:
    """Write a whole object; readers see the old one or the new one, never a mixture."""
    _put(Address.parse(url), data, io.BytesIO(data))


def upload(path: Path, url: str) -> str:
    """Write a file as an object, in parallel parts if it is large.

    Returns:
        The SHA-256 of what was written, in hex.
    """
    try:
        with path.open("rb") as file:
            return _put(Address.parse(url), path, file)
    except OSError as problem:
        raise StoreError(f"{path} cannot be read: {problem.strerror}.") from problem


def delete(url: str) -> int:
    """Delete the object of this name and all below it; return how many went."""
    address = Address.parse(url)
    store = connect(address)
    keys = [Address.parse(remote.url).key for remote in _below(address, markers=True)]
    if address.key and not address.key.endswith("/") and stat(url):
        keys.append(address.key)

    def remove(key: str) -> None:
        try:
            persist(url, endpoint(address), lambda: obstore.delete(store, key))
        except FileNotFoundError:
            return  # someone else was first

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(remove, keys))
    return len(keys)


def missing(url: str) -> StoreError:
    """Return (or raise) the error of an object, or of its bucket, that is not there."""
    list_names(url)
    return StoreError(
        f"there is no object {url} ({endpoint(Address.parse(url))}). Check its name; "
        "upper and lower case differ."
    )


def _put(address: Address, data: bytes | Path, file: BufferedIOBase) -> str:
    """Write, and compare the ETag of what was stored with that of what was meant."""
    store = connect(address)
    sha256 = sha256_of(file)
    size = file.seek(0, 2)
    bucket = address.at("").url

    tries = 0

    def operation() -> None:
        nonlocal tries
        tries += 1
        if tries > 1 and size > PART_BYTES and _holds(store, address.key, sha256):
            return
        answer = obstore.put(
            store,
            address.key,
            data,
            attributes={SHA256: sha256},
            use_multipart=size > PART_BYTES,
            chunk_size=PART_BYTES,
            max_concurrency=WORKERS,
        )
        told = None if is_opaque(bucket) else answer["e_tag"]
        if matches_etag(file, told, PART_BYTES) is not False:
            return
        held = obstore.get(store, address.key)
        digest = hashlib.sha256()
        for block in held.stream():
            digest.update(block)
        if digest.hexdigest() != sha256:
            raise Refetch("what was stored is damaged")
        make_opaque(bucket)

    try:
        persist(address.url, endpoint(address), operation, size_bytes=size)
    except FileNotFoundError as problem:
        raise StoreError(
            f"{address.url} cannot be written at {endpoint(address)}: "
            f"{str(problem).splitlines()[0][:200]}."
        ) from problem
    return sha256


def _holds(store: Store, key: str, sha256: str) -> bool:
    """Whether an upload whose answer was lost has been committed after all."""
    try:
        held = obstore.get(store, key, options={"head": True})
    except FileNotFoundError:
        return False
    return held.attributes.get(SHA256) == sha256


def _below(address: Address, *, markers: bool = False) -> list[Remote]:
    store = connect(address)

    def operation() -> list[ObjectMeta]:
        pages = obstore.list(store, address.key.strip("/") or None)
        return [meta for page in pages for meta in page]

    found = persist(address.url, endpoint(address), operation)
    remotes = (_remote(address, meta) for meta in found)
    kept = (one for one in remotes if markers or not one.url.endswith("/"))
    return sorted(kept, key=lambda remote: remote.url)


def _remote(address: Address, meta: ObjectMeta) -> Remote:
    return Remote(
        url=address.at(meta["path"]).url,
        size=meta["size"],
        etag=meta["e_tag"],
        modified=meta["last_modified"],
    )


def _last(key: str) -> str:
    return key.rstrip("/").rpartition("/")[2]


def _glob(key: str) -> str:
    """Return the regular expression of a glob whose `*` does not cross a slash."""
    steps = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]/]+\])", key)
    return "".join(
        steps.get(piece)
        or (piece.replace("[!", "[^") if piece[:1] == "[" else re.escape(piece))
        for piece in pieces
    )
