"""Tables, packed lines and ranges of large files: the same texts, and faults named."""

from __future__ import annotations

import csv
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmos_jax.data.readers import (
    lines_before,
    read_file,
    read_lines,
    read_row_groups,
    reader_of,
)
from llmos_jax.errors import DataError

TEXTS = ["plain", 'with "quotes", commas', "two\nlines", "é\ttab", ""]


def write_table(path, rows, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    return path


def read(path, text_key="text"):
    return [text for _, text in read_file(path, text_key)]


def refused(path, text_key="text"):
    with pytest.raises(DataError) as caught:
        read(path, text_key)
    return str(caught.value)


@pytest.mark.parametrize("name, delimiter", [("a.csv", ","), ("a.tsv", "\t")])
def test_a_table_gives_a_document_a_row(name, delimiter, tmp_path):
    rows = [["id", "text"], *([number, text] for number, text in enumerate(TEXTS))]
    path = write_table(tmp_path / name, rows, delimiter)
    assert read(path) == TEXTS
    assert read(path, "id") == ["0", "1", "2", "3", "4"]


def test_rows_of_a_table_are_named_by_the_line_they_end_on(tmp_path):
    path = write_table(tmp_path / "a.csv", [["text"], ["one"], ["two\nlines"], ["x"]])
    names = [name for name, _ in read_file(path, "text")]
    assert names == [f"{path}:2", f"{path}:4", f"{path}:5"]


def test_a_table_may_begin_with_a_byte_order_mark_and_hold_long_texts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes("\ufefftext\n".encode() + b"x" * 200_000 + b"\n")
    assert read(path) == ["x" * 200_000]


def test_a_table_without_the_column_is_refused_as_parquet_is(tmp_path):
    path = write_table(tmp_path / "a.csv", [["id", "texts"], ["1", "one"]])
    text = refused(path)
    assert text == (
        f"{path}: no column 'text'; the columns are 'id', 'texts'. Did you mean "
        "'texts'? Set data.text_key to the one that holds the text."
    )
    table = pa.table({"id": ["1"], "texts": ["one"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert refused(tmp_path / "a.parquet") == text.replace("a.csv", "a.parquet")


@pytest.mark.parametrize(
    "raw, said",
    [
        (b"id,text\n1,one\n2,two,three\n", ":3: a row of 3 fields under a header of 2"),
        (b'text\n"one\ntwo\n', ":3: not a row of a table: unexpected end of data"),
        (b"text\none\n\xff\n", ": byte 0xff near line 0 is not UTF-8 text"),
        (b"", ": no column 'text'; the columns are none."),
    ],
)
def test_a_broken_table_is_named(raw, said, tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(raw)
    assert f"{path}{said}" in refused(path)


def packed(raw, suffix):
    if suffix == ".gz":
        return gzip.compress(raw)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(raw)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_lines_are_unpacked(suffix, tmp_path):
    lines = [json.dumps({"text": text}) for text in [*TEXTS, "long" * 600_000]]
    raw = "\n".join([*lines[:2], "", *lines[2:]]).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(raw, suffix))
    found = list(read_file(path, "text"))
    assert [text for _, text in found] == [*TEXTS, "long" * 600_000]
    assert [name for name, _ in found][2:4] == [f"{path}:4", f"{path}:5"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_lines_that_were_cut_short_are_refused(suffix, tmp_path):
    raw = "".join(json.dumps({"text": str(n)}) + "\n" for n in range(9000)).encode()
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(packed(raw, suffix)[:-100])
    assert f"{path}" in refused(path)


def test_other_packed_files_are_not_text(tmp_path):
    assert reader_of(tmp_path / "a.txt.gz") is None
    assert reader_of(tmp_path / "a.jsonl.gz") is not None


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=6), min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=4),
    blank=st.booleans(),
    ends=st.booleans(),
)
def test_ranges_of_lines_are_the_whole_file_once(tmp_path, texts, cuts, blank, ends):
    path = tmp_path / "a.jsonl"
    text = ("\n\n" if blank else "\n").join(json.dumps({"text": one}) for one in texts)
    path.write_text(text + ("\n" if ends else ""))
    size = path.stat().st_size
    bounds = sorted({0, size, *(min(cut, size) for cut in cuts)})
    whole = [
        (int(name.rpartition(":")[2]), one) for name, one in read_file(path, "text")
    ]
    found = [
        (lines_before(path, first) + row, one)
        for first, last in zip(bounds, bounds[1:])
        for row, one in read_lines(path, "text", first, last)
    ]
    assert found == whole


def test_row_groups_are_the_whole_file_once(tmp_path):
    path = tmp_path / "a.parquet"
    texts = [str(number) for number in range(10)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=3)
    parts = [read_row_groups(path, "text", range(*span)) for span in ((0, 2), (2, 4))]
    assert [text for part in parts for _, text in part] == texts
    assert next(read_row_groups(path, "text", [2])) == (0, "6")
