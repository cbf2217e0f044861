"""Hashes of words: the same everywhere, equal where words are, and only there."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmos_jax.corpus.words import _BLOCK_WORDS, words_of

texts = st.lists(st.text(st.characters(codec="utf-8"), max_size=8), max_size=30)


@given(texts)
def test_equal_words_have_equal_hashes_and_others_have_not(parts):
    words = " ".join(parts).casefold().split()
    hashed = words_of(" ".join(parts))
    assert hashed.hashes.size == hashed.sizes.size == len(words)
    assert len(set(hashed.hashes.tolist())) == len(set(words))
    assert hashed.sizes.tolist() == [len(word.encode()) + 1 for word in words]


@given(texts, st.integers(1, 5))
def test_runs_are_equal_where_their_words_are(parts, length):
    words = " ".join(parts).casefold().split()
    runs = [tuple(words[at : at + length]) for at in range(len(words) - length + 1)]
    hashed = words_of(" ".join(parts)).runs(length).tolist()
    assert len(hashed) == len(runs)
    assert len(set(zip(runs, hashed))) == len(set(runs)) == len(set(hashed))


def test_the_digest_ignores_case_and_space_alone():
    assert words_of("A  b\nC").digest == words_of("a b c ").digest
    assert words_of("ab c").digest != words_of("a bc").digest


def test_hashes_are_those_of_every_machine():
    """Signatures of a run that goes on must meet those from before."""
    assert words_of("the same").hashes.tolist() == GOLDEN


def test_blocks_leave_no_seam():
    words = [f"w{number}" for number in range(_BLOCK_WORDS + 3)]
    whole = words_of(" ".join(words))
    alone = words_of(" ".join(words[_BLOCK_WORDS - 2 :]))
    np.testing.assert_array_equal(whole.hashes[-5:], alone.hashes)


GOLDEN = [6113368044229103456, 13570892040044173298]
