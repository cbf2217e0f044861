"""Turn the patterns of `[data]` into a stream of documents.

A pattern is a text file, a folder (searched through, in sorted order), a glob, a .jsonl
or .parquet file, one of these in an object store (s3://, gs://), or the word
`python-docs`. Objects are read from local copies, which are checked. The order of
documents is the order of the patterns and, within one, of the sorted paths: the same on
every machine.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmos_jax import stores
from llmos_jax.data import python_docs
from llmos_jax.data.document import Document
from llmos_jax.data.readers import read_file, reader_of
from llmos_jax.errors import DataError

PYTHON_DOCS = "python-docs"

Found = Path | stores.Remote | None
"""A file, an object of a store, or python-docs."""


def read_documents(patterns: Sequence[str], *, text_key: str) -> Iterator[Document]:
    """Yield every document that is not empty, streaming.

    Raises:
        DataError: a pattern that matches nothing, a file that cannot be read as text,
        or
            nothing but empty documents.
    """
    found = 0
    for source in find(patterns):
        for document in _read(source, text_key):
            if document.text.strip():
                found += 1
                yield document
    if not found:
        raise DataError(
            f"nothing but empty documents in {', '.join(patterns)}: there is no text "
            "to learn from."
        )


def fingerprint_sources(patterns: Sequence[str]) -> list[Any]:
    """Return plain data that changes when the text might have: a cheap cache key.

    Files are known by path, size and time of change, not by content; objects by URL,
    size and ETag; python-docs by the interpreter's build and the facts of its files.
    """
    return [_stamp(source) for source in find(patterns)]


def _stamp(source: Found) -> list[Any]:
    if source is None:
        return python_docs.fingerprint()
    if isinstance(source, stores.Remote):
        return [source.url, source.size, source.etag or str(source.modified)]
    facts = source.stat()
    return [str(source.resolve()), facts.st_size, facts.st_mtime_ns]


def local(source: Found) -> Path | None:
    """Return the file, or a local copy of the object; None is python-docs.

    Raises:
        StoreError: the object cannot be brought here.
    """
    return stores.local_copy(source) if isinstance(source, stores.Remote) else source


def _read(source: Found, text_key: str) -> Iterator[Document]:
    path = local(source)
    if path is None:
        yield from python_docs.documents()
        return
    for name, text in read_file(path, text_key):
        yield Document(name=name, text=text)
    if isinstance(source, stores.Remote):
        stores.release(path)  # read once: its copy may make room for others


def expand(patterns: Sequence[str]) -> list[Path | None]:
    """Return the files that the patterns name, each once, objects as local copies;
    None is python-docs. Raises as `find` and `local`."""
    return [local(source) for source in find(patterns)]


def find(patterns: Sequence[str]) -> list[Found]:
    """Return what the patterns name, each once; nothing is fetched.

    Raises:
        DataError: no pattern, or one that matches nothing.
        StoreError: an object store does not answer, or holds nothing of the name.
    """
    if not patterns:
        raise DataError(
            "no data was named: set data.train to files, folders or patterns."
        )
    files: dict[Found, None] = {}
    for pattern in patterns:
        try:
            files.update(dict.fromkeys(_expand_one(pattern)))
        except OSError as problem:
            raise DataError(f"data {pattern} cannot be read: {problem}") from None
    return list(files)


def _expand_one(pattern: str) -> list[Found]:
    if pattern == PYTHON_DOCS:
        return [None]
    if stores.is_remote(pattern):
        return [*_objects(pattern)]
    path = Path(pattern).expanduser()
    if path.is_dir():
        return [*_files_of(path)]
    if path.exists():
        return [path]
    if not glob.has_magic(pattern):
        raise DataError(f"data file {pattern} does not exist.{_neighbour(path)}")
    found = sorted(glob.glob(str(path), recursive=True))
    files = [Path(name) for name in found if Path(name).is_file()]
    if not files:
        raise DataError(f"no file matches the pattern {pattern}.")
    return [*files]


def _files_of(folder: Path) -> list[Path]:
    """Return the files of a folder that can be read, but for hidden ones."""
    inside = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not _is_hidden(path.relative_to(folder))
    )
    return [path for path in inside if reader_of(path)] or _no_text(folder, inside)


def _objects(url: str) -> list[stores.Remote]:
    """Return the objects of a name or a glob; below a folder those that can be read."""
    found = stores.list_files(url)
    if glob.has_magic(url) or [one.url for one in found] == [url]:
        return found
    inside = {one: Path(one.url.removeprefix(url).strip("/")) for one in found}
    readable = [
        one for one, path in inside.items() if reader_of(path) and not _is_hidden(path)
    ]
    return readable or _no_text(url, inside.values())


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _no_text(folder: Path | str, inside: Iterable[Path]) -> NoReturn:
    suffixes = sorted({path.suffix or path.name for path in inside})
    what = f"only {', '.join(suffixes[:8])}" if suffixes else "nothing at all"
    raise DataError(
        f"folder {folder} holds no text: wanted .txt, .md, .jsonl, .parquet or the "
        f"like, found {what}."
    )


def _neighbour(path: Path) -> str:
    if not path.parent.is_dir():
        return f" Nor does the folder {path.parent}."
    siblings = [sibling.name for sibling in path.parent.iterdir()]
    near = difflib.get_close_matches(path.name, siblings, n=1)
    if near:
        return f" Did you mean {path.parent / near[0]}?"
    return f" The folder {path.parent} has no name near it."
