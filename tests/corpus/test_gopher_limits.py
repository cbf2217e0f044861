"""Each reason to drop a text, and that ordinary text has none."""

from __future__ import annotations

from dataclasses import replace

import preparing
import pytest

from llmos_jax.config.schema import PrepareSection
from llmos_jax.corpus.filters import _repeated, _top, why_dropped
from llmos_jax.corpus.words import words_of

LIMITS = PrepareSection(min_words=5, max_words=1000)


def why(text, limits=LIMITS):
    return why_dropped(text, words_of(text), limits)


def sprinkled(phrase, times, words=400):
    """Prose with a phrase in it so many times, evenly."""
    drawn = preparing.prose(1, words).split()
    step = len(drawn) // times
    parts = [" ".join(drawn[at : at + step]) for at in range(0, len(drawn), step)]
    return f" {phrase} ".join(parts)


LINES = [preparing.prose(seed, 12) for seed in range(12)]

REASONS = {
    " \n\t": "empty",
    "only four words here": "too_short",
    preparing.prose(0, 1001): "too_long",
    "\n".join(LINES[:6] + LINES[:3]): "repeated_lines",
    "\n".join(["x"] * 1 + LINES[:8] + [LINES[8] * 3] * 2): "repeated_lines",
    "\n\n".join(
        ["a b"] * 4 + [preparing.prose(seed, 48) for seed in range(5)]
    ): "repeated_paragraphs",
    sprinkled("internationally acknowledged", 30): "common_runs",
    sprinkled(preparing.prose(7, 11).replace("\n", " "), 9): "repeated_runs",
}


@pytest.mark.parametrize("text, reason", REASONS.items(), ids=range(len(REASONS)))
def test_a_text_is_dropped_for_its_fault(text, reason):
    assert why(text) == reason


def test_prose_is_kept():
    assert why(preparing.prose(3)) is None
    assert why("five words are just enough") is None


def test_filters_can_be_turned_off():
    echo = "\n".join([LINES[0]] * 9)
    assert why(echo) is not None
    assert why(echo, replace(LIMITS, repetition=False)) is None
    assert why("short", replace(LIMITS, min_words=1)) is None
    assert why("short", replace(LIMITS, min_words=1, min_characters=6)) == "too_short"


def test_a_long_text_is_judged_part_by_part():
    """A line that every chapter of a book repeats is not what the limits mean."""
    chapters = [
        f"{LINES[0]}\n{LINES[1]}\n" + preparing.prose(seed, 10_000) for seed in range(3)
    ]
    assert why("\n".join(chapters), PrepareSection()) is None


def words(text):
    return words_of(text.replace(" ", "  "))


def test_shares_count_bytes_of_words_and_the_space_after_each():
    text = words("aa bb cc aa bb dd aa bb")
    top = _top(text.runs(2), text.sizes, 2, 0.0)
    assert top == 3 * len("aa bb ")
    again = _repeated(text.runs(2), text.sizes, 2, 0.0)
    assert again == 2 * len("aa bb ")


def test_overlapping_repeats_count_once():
    text = words("a b c d a b c d")
    assert _repeated(text.runs(2), text.sizes, 2, 0.0) == len("a b c d ")


def test_bounds_never_hide_a_fault():
    """Where a count stops at a bound, the bound is no less than the count."""
    for seed in range(20):
        drawn = preparing.prose(seed, 30).split() * 2
        text = words(" ".join(drawn))
        for length in (2, 5, 10):
            runs = text.runs(length)
            for count in (_top, _repeated):
                exact = count(runs, text.sizes, length, 0.0)
                for allowed in (exact / 2, exact, exact * 2 + 1):
                    bound = count(runs, text.sizes, length, allowed)
                    assert bound == exact or exact <= bound <= allowed
