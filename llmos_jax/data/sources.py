"""Turn the patterns of `[data]` into a stream of documents.

A pattern is a text file, a folder (searched through, in sorted order), a glob, a .jsonl
or .parquet file, or the word `python-docs`. The order of documents is the order of the
patterns and, within one, of the sorted paths: the same on every machine.
"""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmos_jax.data import python_docs
from llmos_jax.data.document import Document
from llmos_jax.data.readers import read_file, reader_of
from llmos_jax.errors import DataError

PYTHON_DOCS = "python-docs"


def read_documents(patterns: Sequence[str], *, text_key: str) -> Iterator[Document]:
    """Yield every document that is not empty, streaming.

    Raises:
        DataError: a pattern that matches nothing, a file that cannot be read as text,
        or
            nothing but empty documents.
    """
    found = 0
    for source in expand(patterns):
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

    Files are known by path, size and time of change, not by content; python-docs by the
    interpreter's build and the same facts of its files.
    """
    return [
        python_docs.fingerprint() if source is None else _stamp(source)
        for source in expand(patterns)
    ]


def _stamp(path: Path) -> list[Any]:
    facts = path.stat()
    return [str(path.resolve()), facts.st_size, facts.st_mtime_ns]


def _read(source: Path | None, text_key: str) -> Iterator[Document]:
    if source is None:
        yield from python_docs.documents()
        return
    for name, text in read_file(source, text_key):
        yield Document(name=name, text=text)


def expand(patterns: Sequence[str]) -> list[Path | None]:
    """Return the files that the patterns name, each once; None is python-docs.

    Raises:
        DataError: no pattern, or one that matches nothing.
    """
    if not patterns:
        raise DataError(
            "no data was named: set data.train to files, folders or patterns."
        )
    files: dict[Path | None, None] = {}
    for pattern in patterns:
        try:
            files.update(dict.fromkeys(_expand_one(pattern)))
        except OSError as problem:
            raise DataError(f"data {pattern} cannot be read: {problem}") from None
    return list(files)


def _expand_one(pattern: str) -> list[Path | None]:
    if pattern == PYTHON_DOCS:
        return [None]
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
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    files = [path for path in inside if reader_of(path)]
    if files:
        return files
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
