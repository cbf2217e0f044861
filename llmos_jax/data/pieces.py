"""Cut long text where no token is cut: many threads, little memory.

Where that is possible depends on the tokenizer. One that splits text into words before
it looks for tokens never joins two of them; one that looks at the whole text can be
cut only if its vocabulary has no token across the cut, and if it writes nothing in
front of each piece.
"""

from __future__ import annotations

import re

from llmos_jax.data.tokenizer import Tokenizer

# In our rules, GPT-2's and Llama 3's: before the space between two words, and between a
# line's end and a line's first letter (not where there is more white space around, of
# which the rules look at the whole run).
_WORD_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])|(?<=\S\n)(?=\S)")
_SPACE_CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
_ACROSS_SPACE = re.compile(r"[A-Za-z][ \u2581]")
_PIECE_CHARACTERS = 1 << 16


def safe_cut(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """Return where text may be cut for this tokenizer; None: nowhere."""
    how = tokenizer.steps()
    steps = _steps(how["pre_tokenizer"])
    if any(step["type"] == "ByteLevel" for step in steps):
        return (
            None if any(step.get("add_prefix_space") for step in steps) else _WORD_CUT
        )
    normalizers = _steps(how["normalizer"])
    if (
        how["model"] != "BPE"
        or any(step["type"] != "Split" for step in steps)
        or any(step["type"] != "Replace" for step in normalizers)
    ):
        return None
    names = tokenizer.vocabulary()
    crosses = any(_ACROSS_SPACE.search(name) for name in names)
    # An unknown space could join an unknown letter before it.
    return _SPACE_CUT if "\u2581" in names and not crosses else None


def cut_pieces(text: str, safe: re.Pattern[str] | None = _WORD_CUT) -> list[str]:
    """Cut a text at places that match `safe`, after every 64 Ki characters or so.

    The pieces, joined, are the text; their ids, joined, are its ids.
    """
    pieces = []
    start = 0
    while safe is not None and len(text) - start > _PIECE_CHARACTERS:
        cut = safe.search(text, start + _PIECE_CHARACTERS)
        if cut is None:
            break
        pieces.append(text[start : cut.start()])
        start = cut.start()
    return [*pieces, text[start:]]


def _steps(part: dict | None) -> list[dict]:
    """Return the steps of a normalizer or pre-tokenizer, a sequence or not."""
    if part is None:
        return []
    inside = part.get("pretokenizers") or part.get("normalizers")
    return (
        [part] if inside is None else [one for step in inside for one in _steps(step)]
    )
