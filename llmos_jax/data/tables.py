"""Turn a table, CSV, TSV or Parquet, into the values of some of its columns.

Each column is asked for by a `Field`: one that is not there is a DataError, or None in
every row where it is not needed.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmos_jax.data.fields import Field, absent
from llmos_jax.errors import DataError


def delimiter_of(path: Path) -> str:
    """Return what stands between the fields of a table of text."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def read_csv(
    lines: Iterable[str], path: Path, fields: Sequence[Field]
) -> Iterator[tuple[str, tuple[str | None, ...] | None]]:
    """Yield (path:line where a row ends, values) of a table with a header; of an empty
    line the values are None."""
    csv.field_size_limit(sys.maxsize)  # a text may be longer than csv's 128 KiB
    delimiter = delimiter_of(path)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        columns = positions(str(path), fields, header)
        for row in rows:
            place = f"{path}:{rows.line_num}"
            if row and len(row) != len(header):
                raise DataError(
                    f"{place}: a row of {len(row)} fields under a header of "
                    f"{len(header)}. Quote fields that hold {delimiter!r}."
                )
            yield place, chosen(row, columns) if row else None
    except csv.Error as problem:
        raise DataError(
            f"{path}:{rows.line_num}: not a row of a table: {problem}."
        ) from None
    except UnicodeDecodeError as problem:
        raise DataError(
            f"{path}: byte {problem.object[problem.start]:#04x} near line "
            f"{rows.line_num} is not UTF-8 text. Convert the file "
            "(`iconv -t utf-8`) or leave it out."
        ) from None


def positions(
    path: str, fields: Sequence[Field], header: Sequence[str]
) -> list[int | None]:
    """Return where each field's column is; None for one that is not there and not
    needed."""
    if problem := absent(path, "column", fields, header):
        raise problem
    return [header.index(one.key) if one.key in header else None for one in fields]


def chosen(row: Sequence[str], columns: Sequence[int | None]) -> tuple[str | None, ...]:
    """Return the values of a row at these positions."""
    return tuple(None if column is None else row[column] for column in columns)


def read_parquet(
    path: Path, fields: Sequence[Field], groups: Sequence[int] | None = None
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Yield (row, values) of a Parquet file; of some of its row groups, in order: rows
    are then counted from 0 at the first of them. A field that holds `text` must."""
    import pyarrow as pa  # heavy, and wanted by this reader alone
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = positions(str(path), fields, schema.names)
            for field, column in zip(fields, columns):
                if field.holds == "text" and column is not None:
                    _check_text(path, field.key, schema.field(field.key).type)
            names = dict.fromkeys(
                one.key for one, at in zip(fields, columns) if at is not None
            )
            row = 0
            for batch in file.iter_batches(
                batch_size=1024, columns=[*names], row_groups=groups
            ):
                read = {name: batch.column(name).to_pylist() for name in names}
                nothing = [None] * batch.num_rows
                for values in zip(*(read.get(one.key, nothing) for one in fields)):
                    yield row, values
                    row += 1
    except (pa.ArrowException, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read as Parquet: {problem}") from None


def _check_text(path: Path, key: str, kind: Any) -> None:
    import pyarrow as pa

    inner = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(inner) or pa.types.is_large_string(inner)):
        raise DataError(f"{path}: column {key!r} holds {kind}, not text.")
