"""Turn one file into its texts: plain text, JSON lines or Parquet.

Each reader yields (name, text), streams where the format can, and answers every fault
of a file with a DataError that names the place: file and byte, file and line, file and
column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from llmos_jax.errors import DataError, did_you_mean

Reader = Callable[[Path, str], Iterator[tuple[str, str]]]

TEXT_SUFFIXES = frozenset(
    ".txt .text .md .rst .tex .html .py .pyi .c .h .cc .cpp .hpp .cu .js .ts .java .go "
    ".rs .rb .sh .sql .css .toml .yaml .yml .csv .tsv".split()
)


def reader_of(path: Path) -> Reader | None:
    """Return the reader for a file's suffix; None where there is none."""
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return _read_jsonl
    if suffix == ".parquet":
        return _read_parquet
    return _read_text if suffix in TEXT_SUFFIXES else None


def read_file(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for each document of a file.

    A file without a suffix is read as text. Long text files are one document each.
    """
    reader = reader_of(path) or (None if path.suffix else _read_text)
    if reader is None:
        raise DataError(
            f"{path}: {path.suffix!r} is not a kind of text that can be read. Use "
            "plain text (.txt, .md, ...), .jsonl or .parquet; unpack what is packed."
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
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            place = f"{path}:{number}"
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as problem:
                raise DataError(
                    f"{place}: not a JSON object on one line: {problem}"
                ) from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: wanted {wanted}, got a {json_kind(row)}.")
            yield place, row


def _text_of(row: dict[str, Any], text_key: str, place: str) -> str:
    if text_key not in row:
        raise DataError(
            f"{place}: no field {text_key!r}; the fields are {_listed(row)}."
            f"{near(text_key, row)} Set data.text_key to the one that holds the text."
        )
    text = row[text_key]
    if not isinstance(text, str):
        raise DataError(
            f"{place}: field {text_key!r} holds a {json_kind(text)}, not text."
        )
    return text


def _read_parquet(path: Path, text_key: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa  # heavy, and wanted by this reader alone
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_key not in schema.names:
                raise DataError(
                    f"{path}: no column {text_key!r}; the columns are "
                    f"{_listed(schema.names)}.{near(text_key, schema.names)} "
                    "Set data.text_key to the one that holds the text."
                )
            kind = schema.field(text_key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{path}: column {text_key!r} holds {kind}, not text.")
            row = 0
            for batch in file.iter_batches(batch_size=1024, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    yield f"{path}:{row}", text or ""
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read as Parquet: {problem}") from None


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def near(word: str, names: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` where a name is near; else nothing."""
    hint = did_you_mean(word, names)
    return hint if hint.startswith(" Did") else ""


def json_kind(value: object) -> str:
    """Name the kind of a JSON value, for messages."""
    names = {dict: "JSON object", list: "list", str: "text", bool: "truth value"}
    return names.get(type(value), "null" if value is None else "number")
