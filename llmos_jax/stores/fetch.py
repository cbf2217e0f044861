"""Bring one object into a file: ranges in parallel, then the checksum of the whole.

Every range asks for the version that was listed (If-Match), so that an object that is
written anew meanwhile is an error and never a mixture.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING

import obstore

from llmos_jax.errors import StoreError
from llmos_jax.stores.address import Address
from llmos_jax.stores.connect import Store, connect, endpoint
from llmos_jax.stores.digests import (
    is_opaque,
    make_clear,
    make_opaque,
    matches_etag,
    sha256_of,
)
from llmos_jax.stores.patience import Refetch, persist

if TYPE_CHECKING:
    from obstore import GetOptions

# 16 MiB, a judgement: S3 advises ranges and parts of 8 to 16 MB ("Performance
# guidelines for Amazon S3"), and the 10000 parts that it allows reach 156 GiB.
PART_BYTES = 16 * 2**20
WORKERS = 8

# Downloads of one object that may prove damaged before it is given up. A judgement.
DOWNLOADS = 5

# The name of the metadata that holds the SHA-256 of what we write.
SHA256 = "llmos-sha256"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """One object of a store.

    Attributes:
        url: its name, `s3://bucket/key`.
        size: in bytes.
        etag: what the store calls this content; None if it says nothing.
        modified: when it was last written.
    """

    url: str
    size: int
    etag: str | None
    modified: datetime


def fetch(remote: Remote, file: BufferedIOBase) -> str:
    """Fill an empty file with an object; return the SHA-256 of it, in hex.

    Raises:
        StoreError: it is gone, was written anew, or stays damaged.
    """
    address = Address.parse(remote.url)
    bucket = address.at("").url
    seen: set[str] = set()
    for _ in range(DOWNLOADS):
        stated = _fill(remote, address, file)
        sha256 = sha256_of(file)
        if stated is not None:
            if sha256 == stated:
                return sha256
            continue
        right = None if is_opaque(bucket) else matches_etag(file, remote.etag)
        if right:
            make_clear(bucket)
        if right is not False or (sha256 in seen and make_opaque(bucket)):
            return sha256
        seen.add(sha256)
    raise StoreError(
        f"{remote.url} is damaged: {DOWNLOADS} downloads from {endpoint(address)} did "
        "not match its checksum. Write it anew, or look for a fault on the way to it."
    )


def fetch_to(remote: Remote, path: Path) -> str:
    """Bring an object to `path`, which is whole or as it was; return its SHA-256."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".fetch-", dir=path.parent)
        part = Path(name)
        try:
            with os.fdopen(handle, "w+b") as file:
                sha256 = fetch(remote, file)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as problem:
        raise StoreError(
            f"{remote.url} cannot be kept in {path}: {problem.strerror or problem}."
        ) from problem
    return sha256


def _fill(remote: Remote, address: Address, file: BufferedIOBase) -> str | None:
    """Write all ranges at their places; return the SHA-256 that the object states."""
    store = connect(address)
    starts = range(0, remote.size, PART_BYTES)
    file.seek(0)
    file.truncate(0)
    stated: str | None = None
    with ThreadPoolExecutor(min(WORKERS, max(1, len(starts)))) as pool:
        pieces = pool.map(lambda start: _piece(store, remote, address, start), starts)
        for data, said in pieces:
            file.write(data)
            stated = said
    file.flush()
    return stated


def _piece(
    store: Store, remote: Remote, address: Address, start: int
) -> tuple[bytes, str | None]:
    end = min(start + PART_BYTES, remote.size)
    options: GetOptions = {"range": (start, end)}
    if remote.etag is not None:
        options["if_match"] = remote.etag

    def operation() -> tuple[bytes, str | None]:
        answer = obstore.get(store, address.key, options=options)
        data = bytes(answer.bytes())
        if len(data) != end - start:
            raise Refetch(f"{len(data)} of {end - start} bytes came")
        return data, answer.attributes.get(SHA256)

    try:
        return persist(remote.url, endpoint(address), operation, size_bytes=end - start)
    except FileNotFoundError as problem:
        raise StoreError(
            f"{remote.url} is gone from {endpoint(address)}. List its folder again."
        ) from problem
