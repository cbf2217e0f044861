"""Cut sources into units of work: some small files, a file, a range of a large one.

The cut depends on the files alone, so a run that goes on finds the same units, and so
do any number of workers.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmos_jax.data.python_docs import documents
from llmos_jax.data.readers import lines_before, read_file, read_lines, read_row_groups
from llmos_jax.data.sources import PYTHON_DOCS, expand
from llmos_jax.errors import DataError

UNIT_BYTES = 16 << 20
"""Of a unit's files, about. A judgement: seconds of work, and a kill loses no more."""

_SPLIT_SUFFIXES = {".jsonl", ".parquet"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Work for one process."""

    side: str
    """`train`, `validation` or `test`, as the config names the source."""
    source: str
    """The pattern that named the files."""
    files: tuple[str, ...]
    """Paths; of python-docs that word."""
    first: int | None = None
    last: int | None = None
    """Of one file: first byte and the byte past the last (JSON lines), or row groups
    (Parquet); None: all of each file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A document as it was read."""

    file: int
    """Which of the unit's files."""
    row: int
    """Line or row, from the first of the unit; -1: the file is one document."""
    text: str
    group: str | None = None


def cut_units(side: str, patterns: Sequence[str]) -> list[Unit]:
    """Return the units of the files that patterns name, each file once, in order.

    Raises:
        DataError: a pattern that matches nothing.
    """
    units: list[Unit] = []
    taken: set[Path | None] = set()
    for pattern in patterns:
        fresh = [path for path in expand([pattern]) if path not in taken]
        taken.update(fresh)
        units += _units_of(side, pattern, fresh)
    return units


def read_unit(unit: Unit, text_key: str) -> Iterator[Found]:
    """Yield the documents of a unit, streaming.

    Raises:
        DataError: a file that cannot be read as text; it names the place.
    """
    if unit.files == (PYTHON_DOCS,):
        for row, document in enumerate(documents(), 1):
            yield Found(file=0, row=row, text=document.text, group=document.group)
    elif unit.first is not None and unit.last is not None:
        path = Path(unit.files[0])
        if path.suffix.lower() == ".parquet":
            rows = read_row_groups(path, text_key, range(unit.first, unit.last))
        else:
            rows = read_lines(path, text_key, unit.first, unit.last)
        for row, text in rows:
            yield Found(file=0, row=row, text=text)
    else:
        for number, name in enumerate(unit.files):
            for place, text in read_file(Path(name), text_key):
                line = place.removeprefix(f"{name}:")
                row = int(line) if line.isdigit() else -1
                yield Found(file=number, row=row, text=text)


def name_of(unit: Unit, file: int, row: int) -> str:
    """Return the name of a document, as `path:line`; it may read much of the file."""
    name = unit.files[file]
    if row < 0:
        return name
    if name == PYTHON_DOCS:
        return f"{name}: {_documents()[row - 1]}"
    if unit.first is not None:
        path = Path(name)
        if path.suffix.lower() == ".parquet":
            row += sum(rows for rows, _ in _row_groups(path)[: unit.first])
        else:
            row += lines_before(path, unit.first)
    return f"{name}:{row}"


def unit_bytes(unit: Unit) -> int:
    """Return the bytes of a unit's files, for a progress bar; python-docs has none."""
    if unit.files == (PYTHON_DOCS,):
        return 0
    path = Path(unit.files[0])
    if unit.first is None or unit.last is None:
        return sum(Path(name).stat().st_size for name in unit.files)
    if path.suffix.lower() == ".parquet":
        return sum(size for _, size in _row_groups(path)[unit.first : unit.last])
    return unit.last - unit.first


def _units_of(side: str, source: str, files: Sequence[Path | None]) -> Iterator[Unit]:
    small: list[str] = []
    size = 0

    def unit(names: Sequence[str], **span: int) -> Unit:
        return Unit(side=side, source=source, files=tuple(names), **span)

    for path in files:
        if path is None:
            yield unit([PYTHON_DOCS])
            continue
        of_file = path.stat().st_size
        if of_file > UNIT_BYTES and path.suffix.lower() in _SPLIT_SUFFIXES:
            yield from (
                unit([str(path)], first=first, last=last)
                for first, last in _spans(path)
            )
            continue
        if small and size + of_file > UNIT_BYTES:
            yield unit(small)
            small, size = [], 0
        small.append(str(path))
        size += of_file
    if small:
        yield unit(small)


def _spans(path: Path) -> Iterator[tuple[int, int]]:
    """Yield byte ranges of a large .jsonl, or ranges of row groups of a .parquet."""
    if path.suffix.lower() == ".jsonl":
        end = path.stat().st_size
        for first in range(0, end, UNIT_BYTES):
            yield first, min(first + UNIT_BYTES, end)
        return
    first = size = 0
    groups = _row_groups(path)
    for group, (_, of_group) in enumerate(groups):
        if group > first and size + of_group > UNIT_BYTES:
            yield first, group
            first, size = group, 0
        size += of_group
    yield first, len(groups)


@functools.cache
def _documents() -> list[str]:
    return [document.name for document in documents()]


@functools.lru_cache(maxsize=8)
def _row_groups(path: Path) -> list[tuple[int, int]]:
    """Return (rows, bytes) of each row group."""
    import pyarrow as pa  # heavy, and wanted for this format alone
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            facts = file.metadata
            groups = [facts.row_group(one) for one in range(facts.num_row_groups)]
            return [(group.num_rows, group.total_byte_size) for group in groups]
    except pa.ArrowException as problem:
        raise DataError(f"{path} cannot be read as Parquet: {problem}") from None
