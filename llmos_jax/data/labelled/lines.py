"""Read the lines of a text file, whatever bytes it holds, and rows of `label text`.

Sets of sentences are often Windows-1252 or Latin-1, or a mixture of these with UTF-8.
A byte that is not UTF-8 is read as Windows-1252, and where that has no such letter as
Latin-1; how many lines needed it is said. A NUL byte is in no text.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from llmos_jax.errors import DataError

_BINARY_SUFFIXES = frozenset(
    ".gz .zst .bz2 .xz .zip .tar .7z .xlsx .xls .ods .pkl .pickle .npy .npz .arrow "
    ".feather .db .sqlite .pdf .docx".split()
)

Notes = list[str]
"""What a run should say of its data."""


def text_lines(path: Path, notes: Notes) -> list[str]:
    """Return the lines of a file with their ends; notes how many were repaired.

    Raises:
        DataError: the file is packed, or is no text.
    """
    suffix = path.suffix.lower()
    if suffix in _BINARY_SUFFIXES:
        raise DataError(
            f"{path}: {suffix} is not a kind of rows that can be read. Use .tsv, .csv, "
            ".jsonl (.gz, .zst), .parquet or lines of `label text`; unpack what is "
            "packed otherwise."
        )
    raw = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if b"\0" in raw:
        raise DataError(
            f"{path}: byte {raw.index(0)} is NUL, so this is no text in UTF-8 or "
            "Latin-1. Convert the file (`iconv -f utf-16 -t utf-8`) or leave it out."
        )
    lines, repaired = [], 0
    for line in raw.split(b"\n"):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            repaired += 1
            text = line.decode("utf-8", errors=_WESTERN)
        lines.append(f"{text}\n")
    if raw.endswith(b"\n") or not raw:
        lines.pop()
    if repaired:
        notes.append(
            f"{path}: {repaired} of {len(lines)} lines are not UTF-8; what is not was "
            "read as Windows-1252"
        )
    return lines


def _western(problem: UnicodeError) -> tuple[str, int]:
    """Read the bytes that are not UTF-8 as Windows-1252, else as Latin-1."""
    assert isinstance(problem, UnicodeDecodeError)
    raw = problem.object[problem.start : problem.end]
    try:
        return raw.decode("cp1252"), problem.end
    except UnicodeDecodeError:
        return raw.decode("latin-1"), problem.end


_WESTERN = "llmos-western"
codecs.register_error(_WESTERN, _western)


def label_text(
    path: Path,
    notes: Notes,
    known: Collection[str] | None,
    shortened: Callable[[str], str],
) -> Iterator[tuple[str, str | None, str]]:
    """Yield (place, label, text) for each line: the first word and what follows.

    With `known` labels the file may be one of texts alone: unless most lines begin with
    one of them (`shortened` as labels are), all lines are texts without labels.

    Raises:
        DataError: a line that begins with a space (no label), or JSON.
    """
    lines = [line.rstrip("\r\n") for line in text_lines(path, notes)]
    first = next((line for line in lines if line.strip()), "")
    if first.startswith(("{", "[")):
        raise DataError(
            f"{path}: lines of `label text` do not begin with {first[0]!r}. Name it "
            ".jsonl if it holds a JSON object a line."
        )
    if known is not None and (odd := _no_labels(lines, known, shortened)):
        notes.append(
            f"{path}: the lines are taken as texts without labels: {odd[1]} of "
            f"{len(lines)} begin with no label that the model knows, first line "
            f"{odd[0]}"
        )
        yield from ((f"{path}:{n}", None, line) for n, line in enumerate(lines, 1))
        return
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}:{number}"
            yield place, *_told_apart(line, place)


def _no_labels(
    lines: list[str], known: Collection[str], shortened: Callable[[str], str]
) -> tuple[int, int] | None:
    """Return (first, number of) the lines that begin with no known label, where they
    are most of the lines that are not empty; else None."""
    others = [
        number
        for number, line in enumerate(lines, 1)
        if line.strip()
        and (line[0].isspace() or shortened(line.split(maxsplit=1)[0]) not in known)
    ]
    num_lines = sum(bool(line.strip()) for line in lines)
    return (others[0], len(others)) if 2 * len(others) > num_lines else None


def _told_apart(line: str, place: str) -> tuple[str, str]:
    if line[0].isspace():
        raise DataError(
            f"{place}: no label. Wanted `label text`: a word, one space or tab, and "
            f"the text; got {line[:40]!r}."
        )
    label = line.split(maxsplit=1)[0]
    return label, line[len(label) + 1 :]
