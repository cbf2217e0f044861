"""Rows of every kind of file, and every fault of one named with its place."""

from __future__ import annotations

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmos_jax import stores
from llmos_jax.config.schema import DataSection
from llmos_jax.data.labelled.read import label_of, read_rows
from llmos_jax.errors import DataError

pytest_plugins = ["object_store"]

ROWS = [("pos", 'a "good" one'), ("neg", "bad, very bad"), ("pos", "")]


def read(path, known=None, notes=None, **section):
    notes = [] if notes is None else notes
    asked = DataSection(**section)
    rows = read_rows(asked, [str(path)], "train", notes, known=known)
    return [(row.label, row.text) for row in rows]


def refused(path, **asked):
    with pytest.raises(DataError) as caught:
        read(path, **asked)
    return str(caught.value)


def write(path, raw):
    path.write_bytes(raw.encode() if isinstance(raw, str) else raw)
    return path


def json_lines(rows, **more):
    return "".join(
        json.dumps({"label": label, "text": text, **more}) + "\n"
        for label, text in rows
    )


def test_all_kinds_of_file_give_the_same_rows(tmp_path):
    lines = json_lines(ROWS)
    files = {
        "a.jsonl": lines.encode(),
        "b.jsonl.gz": gzip.compress(lines.encode()),
        "c.jsonl.zst": pa.compress(lines.encode(), codec="zstd", asbytes=True),
        "d.csv": b'label,text\npos,"a ""good"" one"\nneg,"bad, very bad"\npos,\n',
        "e.tsv": b'text\tlabel\na "good" one\tpos\nbad, very bad\tneg\n\tpos\n',
        "f.train": b'pos a "good" one\nneg bad, very bad\npos\n',
        "g": b'pos\ta "good" one\r\nneg bad, very bad\r\n\r\npos ',
    }
    for name, raw in files.items():
        assert read(write(tmp_path / name, raw)) == ROWS, name
    labels, texts = zip(*ROWS)
    pq.write_table(pa.table({"label": labels, "text": texts}), tmp_path / "h.parquet")
    assert read(tmp_path / "h.parquet") == ROWS


def test_rows_come_from_an_object_store(object_store):
    url = f"{object_store.url}/rows.jsonl"
    stores.write_bytes(url, json_lines(ROWS).encode())
    assert read(url) == ROWS


@pytest.mark.parametrize(
    "value, label",
    [
        (3, "3"),
        (3.0, "3"),
        (True, "true"),
        (False, "false"),
        (" x ", "x"),
        (None, None),
        ("", None),
        (float("nan"), None),
    ],
)
def test_a_label_is_text_a_number_or_a_truth_value(value, label):
    assert label_of(value, "a:1") == label


@pytest.mark.parametrize("value", [[1], {"a": 1}, 0.5])
def test_another_label_is_refused(value):
    with pytest.raises(DataError, match="a:1: the label is .*data.label_key"):
        label_of(value, "a:1")


def test_labels_of_all_kinds_of_column(tmp_path):
    kinds = {
        "int": pa.array([1, 0]),
        "bool": pa.array([True, False]),
        "float": pa.array([1.0, 0.0]),
        "dictionary": pa.array(["b", "a"]).dictionary_encode(),
    }
    pq.write_table(pa.table({"text": ["x", "y"], **kinds}), tmp_path / "a.parquet")
    found = {
        kind: [label for label, _ in read(tmp_path / "a.parquet", label_key=kind)]
        for kind in kinds
    }
    assert found == {
        "int": ["1", "0"],
        "bool": ["true", "false"],
        "float": ["1", "0"],
        "dictionary": ["b", "a"],
    }


def test_labels_end_where_they_are_told_to(tmp_path):
    path = write(tmp_path / "a.label", "DESC:manner How ?\nENTY:cremat What ?\n")
    assert read(path, label_until=":") == [("DESC", "How ?"), ("ENTY", "What ?")]
    assert read(path)[0] == ("DESC:manner", "How ?")
    assert read(path, known=["DESC", "ENTY"], label_until=":")[1][0] == "ENTY"


def test_bytes_that_are_not_utf8_are_repaired_and_counted(tmp_path):
    raw = b"0 caf\xe9 \x93so\x94\n1 na\xc3\xafve \x81\n0 plain\n"
    path, notes = write(tmp_path / "a.all", raw), []
    texts = [text for _, text in read(path, notes=notes)]
    assert texts == ["café “so”", "naïve \x81", "plain"]
    assert notes == [
        f"{path}: 2 of 3 lines are not UTF-8; what is not was read as Windows-1252"
    ]
    table, notes = write(tmp_path / "a.csv", b"label,text\n0,caf\xe9\n"), []
    assert read(table, notes=notes) == [("0", "café")]
    assert "1 of 2 lines" in notes[0]


def test_a_tsv_of_glue_keeps_its_quotes(tmp_path):
    raw = 'sentence\tlabel\n"hm , he said\t1\nno " at all"\t0\n"whole ""x"""\t0\n'
    path = write(tmp_path / "a.tsv", raw)
    assert read(path, text_key="sentence") == [
        ("1", '"hm , he said'),
        ("0", 'no " at all"'),
        ("0", 'whole "x"'),
    ]


def test_a_tsv_with_quoted_line_ends_is_read_as_csv_is(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"one\ntwo"\t1\n')
    assert read(path) == [("1", "one\ntwo")]


def test_a_line_of_10_mb_is_a_row(tmp_path):
    long = "word " * 2_000_000
    assert read(write(tmp_path / "a.txt", f"0 {long}\n")) == [("0", long)]
    assert read(write(tmp_path / "a.csv", f"label,text\n0,{long}\n")) == [("0", long)]


@pytest.mark.parametrize(
    "name, raw, said",
    [
        (
            "a.tsv",
            "sentence\tlabel\nx\t1\n",
            ": no column 'text'; the columns are 'sentence', 'label'. Did you mean "
            "'sentence'? Set data.text_key to the one that holds the text.",
        ),
        (
            "a.csv",
            "text,lable\nx,1\n",
            ": no column 'label'; the columns are 'text', 'lable'. Did you mean "
            "'lable'? Set data.label_key to the one that holds the label.",
        ),
        ("a.jsonl", '{"text": "x"}\n', ":1: no field 'label'"),
        ("a.jsonl", '{"label": 1}\n', ":1: no field 'text'"),
        ("a.jsonl", '{"label": 1, "text": 2}\n', ":1: field 'text' holds a number"),
        ("a.jsonl", '{"label": null, "text": "x"}\n', ":1: no label. Every row"),
        ("a.csv", "label,text\n,x\n", ":2: no label. Every row"),
        ("a.csv", "label,text\n0,x,y\n", ":2: a row of 3 fields"),
        (
            "a.csv",
            "3,Wall St. Bears\n",
            ": no column 'text' and no column 'label'; the columns that the first line "
            "names are '3', 'Wall St. Bears'. Set data.text_key and data.label_key to "
            "those that hold the text and the label, or name the file .txt if its "
            "lines are `label text`.",
        ),
        ("a.csv", "", "the columns that the first line names are none"),
        ("a.txt", "0 x\n lost\n", ":2: no label. Wanted `label text`"),
        ("a.txt", '{"label": 1}\n', "do not begin with '{'. Name it .jsonl"),
        ("a.txt", "0 x\0\n", ": byte 3 is NUL"),
        ("a.txt", "x" * 300 + " y\n", ":1: the label has 300 characters"),
        ("a.zip", "PK", ": .zip is not a kind of rows that can be read"),
        ("a.txt.gz", "x", ": .gz is not a kind of rows"),
    ],
)
def test_a_fault_names_its_place(name, raw, said, tmp_path):
    path = write(tmp_path / name, raw)
    assert refused(path).startswith(f"{path}")
    assert said in refused(path)


def test_a_parquet_without_the_column_is_refused(tmp_path):
    pq.write_table(pa.table({"text": ["x"], "n": [1]}), tmp_path / "a.parquet")
    assert "no column 'label'; the columns are 'text', 'n'." in refused(
        tmp_path / "a.parquet"
    )
    assert "column 'n' holds int64, not text" in refused(
        tmp_path / "a.parquet", text_key="n", label_key="text"
    )


def test_what_has_no_labels_by_nature_is_refused():
    assert "python-packages" in refused("python-docs")


def test_rows_to_predict_may_lack_labels(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": "y", "label": 7}\n')
    assert read(path, known=["0", "7"]) == [(None, "x"), ("7", "y")]
    assert read(path, known=["0", "1"]) == [(None, "x"), (None, "y")]
    assert read(write(tmp_path / "a.csv", "text\nx\n"), known=["0"]) == [(None, "x")]


def test_lines_to_predict_are_texts_unless_most_begin_with_a_label(tmp_path):
    path, notes = write(tmp_path / "a.txt", "0 x\n1 y\n7 z\n"), []
    assert read(path, known=["0", "1"], notes=notes) == [
        ("0", "x"),
        ("1", "y"),
        (None, "z"),
    ]
    assert notes == []
    path = write(tmp_path / "b.txt", "0 x\n\nhow are you\n fine\n")
    assert read(path, known=["0", "1"], notes=notes) == [
        (None, "0 x"),
        (None, ""),
        (None, "how are you"),
        (None, " fine"),
    ]
    assert notes == [
        f"{path}: the lines are taken as texts without labels: 2 of 4 begin with no "
        "label that the model knows, first line 3"
    ]
