"""The task that every Python carries: nothing leaks, and it can be learned."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from llmos_jax.config.schema import DataSection
from llmos_jax.data.labelled import PACKAGES, prepare_labelled, read_to_predict
from llmos_jax.data.labelled.python_packages import LONGEST, pieces
from llmos_jax.places import cache_folder


@pytest.fixture(scope="module")
def data():
    return prepare_labelled(
        DataSection(train=("python-packages",)),
        own=None,
        vocab_size=1000,
        model_name="m",
        seq_len=64,
        cache=cache_folder(),
        on_progress=str,
    )


def test_every_package_is_on_every_side():
    counts = Counter((one.label, one.side) for one in pieces())
    for label in PACKAGES:
        assert counts[label, "train"] >= 60
        assert counts[label, "validation"] >= 10
        assert counts[label, "test"] >= 10


def test_no_text_and_no_group_is_on_two_sides():
    texts, groups = {}, {}
    for one in pieces():
        words = " ".join(re.findall(r"\w+", one.text.lower()))
        assert words not in texts, one.place
        texts[words] = one.side
        assert groups.setdefault(one.group, one.side) == one.side
        assert len(one.text) <= LONGEST


def test_no_piece_names_a_package_or_imports():
    names = re.compile(rf"(?i)(?<![a-z0-9])({'|'.join(PACKAGES)})(?![a-z0-9])")
    for one in pieces():
        assert not names.search(one.text), one
        assert not re.search(r"(?m)^\s*import ", one.text), one


def test_its_own_sides_are_used(data):
    assert data.labels == PACKAGES
    assert min(data.train.counts + data.validation.counts + data.test.counts) >= 10
    assert data.held_out_by == "by file, of each package"
    assert len(data.train) > 3 * len(data.validation)


def test_evaluation_finds_its_test_part(data):
    side, notes = read_to_predict(
        DataSection(train=("python-packages",)),
        data.tokenizer,
        seq_len=64,
        labels=PACKAGES,
        needs_labels=True,
    )
    assert side.fingerprint == data.test.fingerprint
    assert all("longer than" in note for note in notes)


def test_it_may_be_mixed_with_other_rows(tmp_path):
    path = tmp_path / "more.txt"
    path.write_text("".join(f"poetry line {n} of a rhyme\n" for n in range(50)))
    mixed = prepare_labelled(
        DataSection(train=("python-packages", str(path)), validation_share=0.1),
        own=None,
        vocab_size=1000,
        model_name="m",
        seq_len=64,
        cache=cache_folder(),
        on_progress=str,
    )
    place = mixed.labels.index("poetry")
    assert mixed.train.counts[place] == 45
    assert mixed.validation.counts[place] == 5
    assert mixed.test.counts[place] == 0
