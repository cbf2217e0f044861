"""Say why a document is not to be learned from, or that it is.

The limits on repetition are those of Gopher (arXiv 2112.11446, table A1). Those were
made for web pages of up to 100,000 words; in a longer text more is bound to come again,
so a text is judged by the mean over parts of 10,000 words or so, weighted by their
size. That size is a judgement. Shares count bytes in UTF-8 where the paper counts
characters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from llmos_jax.config.schema import PrepareSection
from llmos_jax.corpus.words import Words

LINES = 0.30
LINE_BYTES = 0.20
PARAGRAPHS = 0.30
PARAGRAPH_BYTES = 0.20
TOP_RUNS = {2: 0.20, 3: 0.18, 4: 0.16}
"""Share of the text that its commonest run of so many words may make up."""
REPEATED_RUNS = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""Share of the text that may lie in runs of so many words that were there before."""

PART_WORDS = 10_000
PART_CHARACTERS = 1 << 16
"""As many characters as 10,000 words have, about."""

_PARAGRAPH = re.compile(r"\n{2,}")


def why_dropped(text: str, words: Words, limits: PrepareSection) -> str | None:
    """Return the reason to drop a text, or None to keep it.

    One of: empty, too_short, too_long, repeated_lines, repeated_paragraphs,
    common_runs, repeated_runs.
    """
    if not words.hashes.size:
        return "empty"
    if words.hashes.size < limits.min_words or len(text) < limits.min_characters:
        return "too_short"
    if limits.max_words is not None and words.hashes.size > limits.max_words:
        return "too_long"
    return why_repetitive(text, words) if limits.repetition else None


def why_repetitive(text: str, words: Words) -> str | None:
    """Return which limit on repetition a text breaks, or None."""
    parts = [[*_lines(part)] for part in _parts(text)]
    if _exceed(parts, LINES, LINE_BYTES):
        return "repeated_lines"
    parts = [[*_paragraphs(part)] for part in _parts(text)]
    if _exceed(parts, PARAGRAPHS, PARAGRAPH_BYTES):
        return "repeated_paragraphs"
    if any(_share(words, n, _top, limit) > limit for n, limit in TOP_RUNS.items()):
        return "common_runs"
    return "repeated_runs" if _repeats_runs(words) else None


def _parts(text: str) -> Iterator[str]:
    """Cut a long text at line ends."""
    start = 0
    while len(text) - start > 2 * PART_CHARACTERS:
        cut = text.find("\n", start + PART_CHARACTERS) + 1
        if not cut:
            break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _lines(text: str) -> Iterator[str]:
    return (line.strip() for line in text.split("\n") if line.strip())


def _paragraphs(text: str) -> Iterator[str]:
    return (part.strip() for part in _PARAGRAPH.split(text) if part.strip())


def _exceed(parts: Iterable[list[str]], of_count: float, of_size: float) -> bool:
    """Whether too many of the strings, or too much of their text, came before."""
    count = size = repeated_count = repeated_size = 0
    for strings in parts:
        sizes = sum(map(len, strings))
        first = set(strings)
        count += len(strings)
        size += sizes
        repeated_count += len(strings) - len(first)
        repeated_size += sizes - sum(map(len, first))
    return repeated_count > of_count * count or repeated_size > of_size * size


def _share(
    words: Words, length: int, count: Callable[..., float], limit: float
) -> float:
    """Return the share of the bytes that `count` finds in each part of a text; perhaps
    more than that where it is below the limit."""
    total = words.hashes.size
    parts = max(1, total // PART_WORDS)
    bounds = [total * part // parts for part in range(parts + 1)]
    size = int(words.sizes.sum())
    allowed = limit * size if parts == 1 else 0.0
    found = sum(
        count(words.runs(length, *part), words.sizes[slice(*part)], length, allowed)
        for part in zip(bounds, bounds[1:])
    )
    return found / size


def _repeats_runs(words: Words) -> bool:
    """Whether too much lies in repeated runs of some length. Longer ones lie within
    shorter ones: where these are few, nothing else can be too much."""
    least = min(REPEATED_RUNS.values())
    for length, limit in REPEATED_RUNS.items():
        share = _share(words, length, _repeated, least)
        if share > limit:
            return True
        if share <= least:
            return False
    return False


def _top(runs: np.ndarray, sizes: np.ndarray, length: int, allowed: float) -> float:
    """Return the bytes of the commonest run, the longest of them, if it comes twice;
    or more, where even that is not over what is allowed."""
    if runs.size < 2:
        return 0.0
    in_order = np.sort(runs)
    last = np.flatnonzero(in_order[1:] != in_order[:-1])
    bounds = np.concatenate([[-1], last, [runs.size - 1]])
    counts = bounds[1:] - bounds[:-1]
    most = int(counts.max())
    if most < 2:
        return 0.0
    if (at_most := most * length * float(sizes.max())) <= allowed:
        return at_most
    commonest = in_order[bounds[1:][counts == most]]
    starts = np.flatnonzero(np.isin(runs, commonest))
    before = np.concatenate([[0], np.cumsum(sizes)])
    return float((before[starts + length] - before[starts]).max() * most)


def _repeated(
    runs: np.ndarray, sizes: np.ndarray, length: int, allowed: float
) -> float:
    """Return the bytes in runs that came before, each byte once; or more, where even
    that is not over what is allowed."""
    if runs.size < 2:
        return 0.0
    in_order = np.sort(runs)
    again = int(np.count_nonzero(in_order[1:] == in_order[:-1]))
    at_most = again * length * float(sizes.max())
    if not again or at_most <= allowed:
        return at_most
    is_again = np.ones(runs.size, bool)
    is_again[np.unique(runs, return_index=True)[1]] = False
    covered = np.zeros(sizes.size, bool)
    for offset in range(length):
        covered[offset : offset + runs.size] |= is_again
    return float(sizes[covered].sum())
