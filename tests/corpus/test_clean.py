"""What is mended in a text, and what is left as somebody wrote it."""

from __future__ import annotations

import pytest

from llmos_jax.corpus.clean import clean_text


@pytest.mark.parametrize(
    "read, mended",
    [
        ("schÃ¶n und grÃ¼n", "schön und grün"),
        ("plain\nschÃ¶n\nschön", "plain\nschön\nschön"),
        ("nul\x00 bell\x07 del\x7f", "nul bell del"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\ufeffmark\u206f\ufffb", "mark"),
        ("a\r\nb\rc\u2028d\u2029e", "a\nb\nc\nd\ne"),
        ("cafe\u0301", "café"),
        ("half \ud800 a pair", "half \ufffd a pair"),
        ("a whole \ud83d\ude00 pair", "a whole 😀 pair"),
    ],
)
def test_what_came_about_on_the_way_is_mended(read, mended):
    assert clean_text(read) == mended


@pytest.mark.parametrize(
    "text",
    ["&amp; &lt;b&gt;", "“curly” ‘quotes’", "ﬁne", "ｗｉｄｅ", "\ttab\x0cpage", ""],
)
def test_what_somebody_wrote_stays(text):
    assert clean_text(text) == text


def test_repair_can_be_left_out():
    assert clean_text("schÃ¶n\x00 a\x85b", repair=False) == "schÃ¶n a\nb"
