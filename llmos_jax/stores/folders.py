"""Copy whole folders to and from a store, several files at a time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llmos_jax.errors import StoreError
from llmos_jax.stores.address import Address, join
from llmos_jax.stores.digests import matches_etag
from llmos_jax.stores.fetch import PART_BYTES, Remote, fetch_to
from llmos_jax.stores.objects import list_files, upload

# Files at a time; each large one moves in parallel parts besides. A judgement.
FILES = 4


def upload_folder(folder: Path, url: str) -> int:
    """Write each file below `folder` under `url`; return their bytes.

    Not atomic: who reads meanwhile sees some of the files. Write a marker last.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise StoreError(f"{folder} has no files to write to {url}.")
    with ThreadPoolExecutor(FILES) as pool:
        list(
            pool.map(
                lambda path: upload(
                    path, join(url, path.relative_to(folder).as_posix())
                ),
                files,
            )
        )
    return sum(path.stat().st_size for path in files)


def download_folder(url: str, folder: Path) -> int:
    """Bring each object below `url` into `folder`; return the bytes that were fetched.

    A file that is there already, with the size and the ETag of its object, stays.
    """
    root = Address.parse(url).key.rstrip("/")

    def bring(remote: Remote) -> int:
        key = Address.parse(remote.url).key
        path = folder / key.removeprefix(root).lstrip("/")
        if _is_same(path, remote):
            return 0
        fetch_to(remote, path)
        return remote.size

    remotes = list_files(f"{url.rstrip('/')}/")
    with ThreadPoolExecutor(FILES) as pool:
        return sum(pool.map(bring, remotes))


def _is_same(path: Path, remote: Remote) -> bool:
    try:
        if path.stat().st_size != remote.size:
            return False
        with path.open("rb") as file:
            return (
                matches_etag(file, remote.etag, PART_BYTES) is True
                or matches_etag(file, remote.etag) is True
            )
    except OSError:
        return False
