"""Name a piece of text, and say which side of the split it is on.

A document is training text or held-out text by a hash of itself, so that adding,
removing or reordering other documents never moves it, and equal documents never sit on
both sides. Documents that repeat one another (the docstrings and the source of one
module) carry a `group`, and the group's name is hashed instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """Text with the name of where it came from (a path, a path:line, a topic)."""

    name: str
    text: str
    group: str | None = None


def is_held_out(document: Document, share: float) -> bool:
    """Say whether a document belongs to the held-out `share` (0 to 1) of all text."""
    hashed = document.text if document.group is None else document.group
    digest = hashlib.sha256(hashed.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def split(
    documents: Iterable[Document], share: float
) -> tuple[list[Document], list[Document]]:
    """Return (train, held_out), each in the order given."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        (held_out if is_held_out(document, share) else train).append(document)
    return train, held_out


def cut_end(text: str, share: float) -> tuple[str, str]:
    """Cut a text in two near the end of a line, the last `share` of it apart.

    For the few long documents of which a hash would take all or nothing. Where no line
    ends nearby the cut is between words, and failing that anywhere.
    """
    goal = len(text) - max(1, round(len(text) * share))
    for mark in ("\n", " "):
        cut = text.rfind(mark, goal - goal // 10, goal) + 1
        if cut:
            return text[:cut], text[cut:]
    return text[:goal], text[goal:]
