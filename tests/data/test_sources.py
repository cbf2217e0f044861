"""Patterns become documents, and every fault of a file is one clear DataError."""

from __future__ import annotations

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.data import Document, read_documents, split
from llmos_jax.data.document import cut_end
from llmos_jax.data.sources import fingerprint_sources
from llmos_jax.errors import DataError


def read(*patterns, text_key="text"):
    return list(read_documents([str(one) for one in patterns], text_key=text_key))


def texts(*patterns, **options):
    return [document.text for document in read(*patterns, **options)]


def write_lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo é\n".encode())
    assert read(path) == [Document(name=str(path), text="one\r\ntwo é\n")]


def test_file_without_suffix_is_text(tmp_path):
    (tmp_path / "README").write_text("hello")
    assert texts(tmp_path / "README") == ["hello"]


def test_folder_is_searched_in_sorted_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.md", ".git/x.txt", "a/.h.txt", "c.bin", "a/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"text": name}))
    found = [document.name for document in read(tmp_path)]
    assert found == [
        f"{tmp_path}/{name}" for name in ("a/y.jsonl:1", "a/z.md", "b.txt")
    ]


def test_glob_matches_sorted_and_a_file_named_twice_is_read_once(tmp_path):
    for name in ("b.txt", "a.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt", tmp_path / "a.txt") == ["a.txt", "b.txt"]


def test_jsonl_gives_a_document_a_line_and_skips_blank_ones(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"body": "x"}, {"body": ""}, {"body": "ü"})
    path.write_text(path.read_text() + "\n")
    assert texts(path, text_key="body") == ["x", "ü"]


def test_parquet_gives_a_document_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["x", None, "", "ü"], "id": [1, 2, 3, 4]}), path)
    assert [document.name for document in read(path)] == [f"{path}:0", f"{path}:3"]
    assert texts(path) == ["x", "ü"]


def test_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "train.txt").write_text("x")
    with pytest.raises(DataError, match=r"does not exist.*Did you mean .*train\.txt"):
        read(tmp_path / "trian.txt")
    with pytest.raises(DataError, match="Nor does the folder"):
        read(tmp_path / "no" / "x.txt")
    with pytest.raises(DataError, match="has no name near it"):
        read(tmp_path / "zzzzzzzz.jsonl")


@pytest.mark.parametrize("row", [b"\xff\xfe", b"ab\xffc"])
def test_undecodable_bytes_name_file_and_offset(tmp_path, row):
    path = tmp_path / "a.txt"
    path.write_bytes(row)
    where = f"{path}: byte 0xff at offset {row.index(0xFF)} is not UTF-8"
    with pytest.raises(DataError, match=re.escape(where)):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', r"a\.jsonl:2: not a JSON object on one line"),
        ('{"text": "\\ud800"}', r"a\.jsonl:2: not a JSON object"),
        ("[1]", r"a\.jsonl:2: wanted a JSON object with a 'text' field, got a list"),
        ('{"txt": "x", "id": 1}', r":2: no field 'text'; the fields are 'txt', 'id'"),
        ('{"txt": "x"}', r"Did you mean 'txt'\? Set data\.text_key"),
        ('{"text": 3}', r":2: field 'text' holds a number, not text"),
        ('{"text": null}', r":2: field 'text' holds a null, not text"),
    ],
)
def test_bad_json_line_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(DataError, match=message):
        read(path)


def test_undecodable_json_line_names_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1: not a JSON object"):
        read(path)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"txt": ["x"]}, r"no column 'text'; the columns are 'txt'\. Did you mean"),
        ({"text": [1]}, r"column 'text' holds int64, not text"),
    ],
)
def test_parquet_without_text_says_what_there_is(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.parquet")


def test_damaged_parquet_is_an_error(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(tmp_path / "a.parquet")


def test_what_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no file matches the pattern"):
        read(tmp_path / "*.txt")
    with pytest.raises(DataError, match=r"holds no text.*found nothing at all"):
        read(tmp_path)
    (tmp_path / "a.docx").write_text("x")
    with pytest.raises(DataError, match=r"holds no text.*\s.*found only \.docx"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"'\.docx' is not a kind of text"):
        read(tmp_path / "a.docx")
    with pytest.raises(DataError, match="no data was named"):
        read()


def test_nothing_but_empty_documents_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(DataError, match=r"nothing but empty documents in .*a\.txt"):
        read(tmp_path / "a.txt")


def test_fingerprint_changes_with_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x")
    before = fingerprint_sources([str(path)])
    assert fingerprint_sources([str(path)]) == before
    path.write_text("xy")
    assert fingerprint_sources([str(path)]) != before


documents = st.builds(
    Document,
    name=st.just("x"),
    text=st.text(st.characters(exclude_categories=["Cs"])),
    group=st.none() | st.sampled_from("abc"),
)


@given(st.lists(documents), st.lists(documents), st.floats(0.01, 0.99))
def test_other_documents_never_move_one_to_the_other_side(some, others, share):
    train, held_out = split(some, share)
    more_train, more_held_out = split([*others, *some], share)
    assert len(train) + len(held_out) == len(some)
    assert all(document in more_train for document in train)
    assert all(document in more_held_out for document in held_out)
    assert not {one.group or one.text for one in train} & {
        one.group or one.text for one in held_out
    }


def test_split_takes_about_its_share():
    many = [Document(name="x", text=str(number)) for number in range(4000)]
    assert 300 < len(split(many, 0.1)[1]) < 500


@given(st.text(min_size=2), st.floats(0.01, 0.5))
def test_cut_end_loses_nothing(text, share):
    begin, end = cut_end(text, share)
    assert begin + end == text
    assert end


def test_cut_end_cuts_after_a_line():
    text = "".join(f"line {number}\n" for number in range(1000))
    begin, end = cut_end(text, 0.1)
    assert begin.endswith("\n")
    assert 0.09 < len(end) / len(text) < 0.12
