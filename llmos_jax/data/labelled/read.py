"""Turn the files that `[data]` names into rows of a text and its label.

By suffix: .jsonl (.gz, .zst) and .parquet, .csv and .tsv with a header, whose columns
`data.text_key` and `data.label_key` name; anything else is lines of `label text`. All
rows are held in memory: labelled data are small beside text to learn language from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_jax import stores
from llmos_jax.config.schema import DataSection
from llmos_jax.data.fields import Field, absent, json_kind, text_field
from llmos_jax.data.labelled.lines import Notes, label_text, text_lines
from llmos_jax.data.labelled.python_packages import PYTHON_PACKAGES, Side, pieces
from llmos_jax.data.readers import PACKED_SUFFIXES
from llmos_jax.data.readers import read_rows as read_json
from llmos_jax.data.sources import PYTHON_DOCS, find, local
from llmos_jax.data.tables import chosen, positions, read_csv, read_parquet
from llmos_jax.errors import DataError

_LONGEST_LABEL = 200
"""A judgement: a longer label is a text in the wrong column."""

Raw = tuple[str, Any, str | None]
"""Place, label and text as they stand in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A text, what it is, and where it stands."""

    text: str
    label: str | None
    """None: it has none, or (of rows to predict) one that the model does not know."""
    place: str
    group: str | None = None
    """Rows of one group stay on one side of a split; None: those of the same text."""


def read_rows(
    section: DataSection,
    patterns: Sequence[str],
    side: Side,
    notes: Notes,
    *,
    known: Sequence[str] | None = None,
) -> list[Row]:
    """Return the rows that the patterns name, in order.

    Args:
        section: how labels and texts are found.
        patterns: files, folders, globs, objects, or `python-packages`.
        side: which part of `python-packages`, which has sides of its own.
        notes: gets what was repaired, or not understood.
        known: the labels of a model whose predictions are wanted: rows may then lack a
            label, or have another one, and say None. None: every row must have one.

    Raises:
        DataError: a file that cannot be read or lacks a column; a row without a label.
        StoreError: an object that cannot be brought here.
    """
    until = section.label_until
    rows: list[Row] = []
    for pattern in patterns:
        if pattern == PYTHON_PACKAGES:
            rows += [
                Row(text=one.text, label=one.label, place=one.place, group=one.group)
                for one in pieces()
                if one.side == side
            ]
            continue
        for place, raw, text in _raw_rows(section, pattern, notes, known):
            label = label_of(raw, place, until)
            if known is None and label is None:
                raise DataError(
                    f"{place}: no label. Every row of labelled data needs one; give it "
                    "one, or take the row out."
                )
            is_known = known is None or label in known
            rows.append(
                Row(text=text or "", label=label if is_known else None, place=place)
            )
    return rows


def label_of(value: Any, place: str, until: str = "") -> str | None:
    """Return a label as text, up to `until`: an int or a truth value by its name, a
    whole float as the int; None where there is none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, bool):
        value = "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int):
        raise DataError(
            f"{place}: the label is {_kind(value)}; wanted text, a whole number or a "
            "truth value. Set data.label_key to the one that holds the label."
        )
    label = cut_label(str(value), until)
    if len(label) > _LONGEST_LABEL:
        raise DataError(
            f"{place}: the label has {len(label)} characters ({label[:40]!r}...), and "
            f"{_LONGEST_LABEL} are allowed: is it a text? Wanted a label, one "
            "separator and the text, or data.label_key to name the column of labels."
        )
    return label or None


def cut_label(label: str, until: str) -> str:
    """Return a label without white space around it, and without what follows `until`
    (`data.label_until`)."""
    return (label.partition(until)[0] if until else label).strip()


def _kind(value: Any) -> str:
    return "not a whole number" if isinstance(value, float) else f"a {json_kind(value)}"


def _raw_rows(
    section: DataSection, pattern: str, notes: Notes, known: Sequence[str] | None
) -> Iterator[Raw]:
    if pattern == PYTHON_DOCS:
        raise DataError(
            f"{PYTHON_DOCS} has no labels. Set data.train to labelled rows, or to "
            f"{PYTHON_PACKAGES} for the task that every Python carries."
        )
    for source in find([pattern]):
        path = local(source)
        assert path is not None
        try:
            yield from _read(path, section, notes, known)
        except OSError as problem:
            raise DataError(
                f"{path} cannot be read: {problem.strerror or problem}"
            ) from None
        if isinstance(source, stores.Remote):
            stores.release(path)


def _read(
    path: Path, section: DataSection, notes: Notes, known: Sequence[str] | None
) -> Iterator[Raw]:
    suffix = path.suffix.lower()
    fields = (
        text_field(section.text_key),
        Field(
            key=section.label_key,
            setting="data.label_key",
            holds="label",
            is_needed=known is None,
        ),
    )
    if suffix in PACKED_SUFFIXES and path.stem.lower().endswith(".jsonl"):
        return _json(path, fields)
    if suffix == ".jsonl":
        return _json(path, fields)
    if suffix == ".parquet":
        return _parquet(path, fields)
    if suffix in (".csv", ".tsv"):
        return _table(path, fields, notes)

    def shortened(word: str) -> str:
        return cut_label(word, section.label_until)

    return label_text(path, notes, known, shortened)


def _json(path: Path, fields: tuple[Field, Field]) -> Iterator[Raw]:
    text_is, label_is = fields
    for place, row in read_json(path):
        if problem := absent(place, "field", fields, row):
            raise problem
        text = row[text_is.key]
        if text is not None and not isinstance(text, str):
            raise DataError(
                f"{place}: field {text_is.key!r} holds a {json_kind(text)}, not text."
            )
        yield place, row.get(label_is.key), text


def _parquet(path: Path, fields: tuple[Field, Field]) -> Iterator[Raw]:
    for row, (text, label) in read_parquet(path, fields):
        yield f"{path}:{row}", label, text


def _table(path: Path, fields: tuple[Field, Field], notes: Notes) -> Iterator[Raw]:
    lines = text_lines(path, notes)
    if path.suffix.lower() == ".tsv" and _is_a_row_a_line(lines):
        rows = _plain_rows(lines, path, fields)
    else:
        rows = read_csv(lines, path, fields)
    for place, values in rows:
        if values is not None:
            text, label = values
            yield place, label, text


def _is_a_row_a_line(lines: list[str]) -> bool:
    """Say whether each line of a TSV has the fields of the first: quotes are then the
    text's own, as in the files of GLUE, and no field holds a line's end."""
    wanted = lines[0].count("\t") if lines else 0
    return wanted > 0 and all(
        line.count("\t") == wanted for line in lines if line.strip()
    )


def _plain_rows(
    lines: Iterable[str], path: Path, fields: Sequence[Field]
) -> Iterator[tuple[str, tuple[str | None, ...] | None]]:
    """Rows of a TSV whose fields are as they stand, but for those quoted whole."""
    columns: list[int | None] | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = [_unquoted(one) for one in line.rstrip("\r\n").split("\t")]
        if columns is None:
            columns = positions(str(path), fields, row)
            continue
        yield f"{path}:{number}", chosen(row, columns)


def _unquoted(field: str) -> str:
    inside = field[1:-1]
    is_quoted = len(field) > 1 and field[0] == field[-1] == '"'
    if not is_quoted or '"' in inside.replace('""', ""):
        return field
    return inside.replace('""', '"')
