"""Turn one file into its texts: plain text, JSON lines, Parquet or CSV.

Each reader yields (name, text), streams where the format can, and answers every fault
of a file with a DataError that names the place: file and byte, file and line, file and
column.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import msgspec

from llmos_jax.data.fields import absent, json_kind, text_field
from llmos_jax.data.tables import read_csv, read_parquet
from llmos_jax.errors import DataError

Reader = Callable[[Path, str], Iterator[tuple[str, str]]]

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .js .ts .java .go "
    ".rs .rb .sh .sql .css .toml .yaml .yml".split()
)

PACKED_SUFFIXES = frozenset({".gz", ".zst"})
"""Of JSON lines: `.jsonl.gz`, `.jsonl.zst`."""


def reader_of(path: Path) -> Reader | None:
    """Return the reader for a file's suffix; None where there is none."""
    suffix = path.suffix.lower()
    if suffix in PACKED_SUFFIXES and path.stem.lower().endswith(".jsonl"):
        return _read_jsonl
    return _BY_SUFFIX.get(suffix) or (_read_text if suffix in TEXT_SUFFIXES else None)


def read_file(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document of a file.

    A file without a suffix is read as text. Long text files are one document each.
    """
    reader = reader_of(path) or (None if path.suffix else _read_text)
    if reader is None:
        raise DataError(
            f"{path}: {path.suffix!r} is not a kind of text that can be read. Use "
            "plain text (.txt, .md, ...), .jsonl (.gz, .zst), .parquet, .csv or .tsv; "
            "unpack what is packed otherwise."
        )
    try:
        yield from reader(path, text_key)
    except OSError as problem:
        raise DataError(
            f"{path} cannot be read: {problem.strerror or problem}"
        ) from None


def _read_text(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path}: byte {raw[problem.start]:#04x} at offset {problem.start} is not "
            f"UTF-8 text. Convert the file (`iconv -t utf-8`) or leave it out."
        ) from None
    yield str(path), text.removeprefix("\ufeff")


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path:line, object) for each line of a JSON lines file."""
    try:
        yield from _read_rows(path)
    except OSError as problem:
        raise DataError(
            f"{path} cannot be read: {problem.strerror or problem}"
        ) from None


def _read_jsonl(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    for place, row in _read_rows(path, f"a JSON object with a {text_key!r} field"):
        yield place, _text_of(row, text_key, place)


def _read_rows(
    path: Path, wanted: str = "a JSON object"
) -> Iterator[tuple[str, dict[str, Any]]]:
    with _unpacked(path) as lines:
        for number, line in enumerate(_lines(lines, path), 1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            yield place, _row_of(line, place, wanted)


def read_lines(
    path: Path, text_key: str, first: int, last: int
) -> Iterator[tuple[int, str]]:
    """Yield (row, text) for lines of a .jsonl that begin at bytes first to last - 1.

    Rows count from 1 at the first of them; a fault names the line of the file.
    """
    wanted = f"a JSON object with a {text_key!r} field"
    with path.open("rb") as lines:
        lines.seek(max(0, first - 1))
        if first:
            lines.readline()  # the rest of a line that began before
        number = 0
        while lines.tell() < last and (line := lines.readline()):
            number += 1
            if line.isspace():
                continue
            try:
                text = _text_of(_row_of(line, "", wanted), text_key, "")
            except DataError as fault:
                where = f"{path}:{lines_before(path, first) + number}"
                raise DataError(f"{where}{fault}") from None
            yield number, text


def _lines(file: IO[bytes], path: Path) -> Iterator[bytes]:
    """Yield lines; what was packed and cannot be unpacked is a DataError."""
    try:
        if path.suffix.lower() != ".zst":
            yield from file
            return
        rest = b""
        while block := file.read(1 << 20):
            *whole, rest = (rest + block).split(b"\n")
            yield from whole
        if rest:
            yield rest
    except (EOFError, zlib.error, gzip.BadGzipFile) as problem:
        raise DataError(f"{path} cannot be unpacked: {problem}") from None
    except OSError as problem:
        if path.suffix.lower() not in PACKED_SUFFIXES:
            raise
        raise DataError(f"{path} cannot be unpacked: {problem}") from None


def lines_before(path: Path, offset: int) -> int:
    """Return how many lines begin before a byte."""
    count, at, last = 0, 0, b"\n"
    with path.open("rb") as file:
        while at < offset and (block := file.read(min(1 << 20, offset - at))):
            count += block.count(b"\n")
            at += len(block)
            last = block[-1:]
    return count + (last != b"\n")


def _row_of(line: bytes, place: str, wanted: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as problem:
        raise DataError(f"{place}: not a JSON object on one line: {problem}") from None
    if not isinstance(row, dict):
        raise DataError(f"{place}: wanted {wanted}, got a {json_kind(row)}.")
    return row


def _unpacked(path: Path) -> IO[bytes]:
    """Open a file that may be packed with gzip or Zstandard."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix.lower() == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
    return path.open("rb")


def _text_of(row: dict[str, Any], text_key: str, place: str) -> str:
    if problem := absent(place, "field", [text_field(text_key)], row):
        raise problem
    text = row[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_key!r} holds a {json_kind(text)}, not text."
        )
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    for row, text in read_row_groups(path, text_key):
        yield f"{path}:{row}", text


def read_row_groups(
    path: Path, text_key: str, groups: Sequence[int] | None = None
) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of a Parquet file; of some of its row groups, in order: rows
    are then counted from 0 at the first of them."""
    for row, (text,) in read_parquet(path, [text_field(text_key)], groups):
        yield row, text or ""


def _read_csv(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    """A table with a header; path:line is where a row ends."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        for place, values in read_csv(file, path, [text_field(text_key)]):
            yield place, (values[0] or "") if values else ""


_BY_SUFFIX: dict[str, Reader] = {
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
