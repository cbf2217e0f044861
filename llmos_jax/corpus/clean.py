"""Mend a text: encodings, control characters, line ends."""

from __future__ import annotations

import re
import unicodedata

from ftfy import TextFixerConfig, badness, fix_text, fixes

# Only what was decoded wrongly is mended: entities, quotes, ligatures and wide letters
# are what somebody wrote.
_ENCODING = TextFixerConfig(
    unescape_html=False,
    remove_terminal_escapes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    uncurl_quotes=False,
    fix_line_breaks=False,
    fix_surrogates=False,
    remove_control_chars=False,
    normalization=None,
    explain=False,
)
_LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
_ESCAPES = re.compile("\x1b\\[[0-9;?]*[a-zA-Z]")
# C0 but for tab, newline and form feed (which Python's own sources hold), DEL, C1, and
# the marks of direction and of interlinear text that ftfy removes.
_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x9f\u206a-\u206f\ufeff\ufff9-\ufffc]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


def clean_text(text: str, *, repair: bool = True) -> str:
    """Return the text without control characters, with `\\n` line ends, in NFC.

    Args:
        text: as it was read.
        repair: also mend lines that were decoded by the wrong encoding.
    """
    if not text.isascii():
        if _SURROGATES.search(text):
            text = fixes.fix_surrogates(text)
        if repair:
            text = _repaired(text)
        text = unicodedata.normalize("NFC", text)
    if "\x1b" in text:
        text = _ESCAPES.sub("", text)
    if "\r" in text or not text.isascii():
        text = _LINE_ENDS.sub("\n", text)
    return _CONTROLS.sub("", text)


def _repaired(text: str) -> str:
    """Mend line by line: one wrongly decoded line says nothing of the others."""
    return "\n".join(
        fix_text(line, _ENCODING)
        if not line.isascii() and badness.is_bad(line)
        else line
        for line in text.split("\n")
    )
