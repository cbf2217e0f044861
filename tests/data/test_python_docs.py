"""The text that every Python carries: three kinds, whole modules on one side."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from llmos_jax.data import read_documents, split
from llmos_jax.data.python_docs import _walk, fingerprint, source_of

QUICKSTART_SHARE = 0.03


@pytest.fixture(scope="module")
def documents():
    return list(read_documents(["python-docs"], text_key="text"))


def kind(document):
    return document.name.partition("/")[0]


def num_bytes(documents):
    sizes = Counter()
    for document in documents:
        sizes[kind(document)] += len(document.text.encode())
    return sizes


def test_there_are_topics_docstrings_and_source(documents):
    names = [document.name for document in documents]
    assert len(set(names)) == len(names)
    assert {"topics/compound", "docs/argparse", "source/argparse"} <= set(names)
    sizes = num_bytes(documents)
    assert sizes["topics"] > 300_000
    assert sizes["docs"] > 1_500_000
    assert sizes["source"] > 6_000_000


def test_tests_tables_and_machine_names_are_left_out(documents):
    names = {document.name for document in documents}
    modules = {name.partition("/")[2] for name in names}
    assert not modules & {"encodings.cp1252", "html.entities", "pydoc_data.topics"}
    assert not [name for name in modules if {"test", "pip"} & set(name.split("."))]
    assert not [name for name in modules if name.startswith("_sysconfigdata")]


def test_chapters_do_not_repeat_paragraphs(documents):
    counts = Counter(
        " ".join(paragraph.split())
        for document in documents
        if kind(document) == "topics"
        for paragraph in document.text.split("\n\n")
        if len(paragraph) > 60
    )
    assert counts.most_common(1)[0][1] == 1


def test_held_out_part_has_every_kind_and_a_fixed_size(documents):
    _, held_out = split(documents, QUICKSTART_SHARE)
    sizes = num_bytes(held_out)
    assert set(sizes) == {"topics", "docs", "source"}
    assert 250_000 < sum(sizes.values()) < 350_000


def test_docstrings_and_source_of_a_module_are_on_one_side(documents):
    sides = split(documents, QUICKSTART_SHARE)
    train, held_out = (
        {one.name.partition("/")[2] for one in side if kind(one) != "topics"}
        for side in sides
    )
    assert held_out
    assert not train & held_out
    assert ("_pydecimal" in train) == ("decimal" in train)


def test_documents_are_the_same_twice(documents):
    assert list(read_documents(["python-docs"], text_key="text")) == documents


def test_fingerprint_names_the_interpreter():
    assert fingerprint()[0] == sys.version
    assert fingerprint() == fingerprint()


def test_docstrings_come_under_dotted_names():
    import ast

    tree = ast.parse(
        '"""Top."""\nif 1:\n class A:\n  """A class."""\n  def f(self): "method"\n'
        'async def g():\n "outer"\n def h(): "hidden"\n'
    )
    assert list(_walk(tree, "m")) == [
        ("m", "Top."),
        ("m.A", "A class."),
        ("m.A.f", "method"),
        ("m.g", "outer"),
    ]


def test_a_table_is_not_source(tmp_path):
    path = tmp_path / "table.py"
    path.write_text("T = (\n" + '    "abcdefgh",\n' * 400 + ")\n")
    assert source_of(path) == ""
    path.write_text("def f():\n    return 1\n" * 400)
    assert source_of(path).startswith("def f")
