"""Read the text of each side once: training, validation and, where named, test.

Validation text is what the config names, or a share of the training documents chosen by
content hash. A few long files leave a hash nothing to choose from (one file is one
document): then the end of each document is held out, and the report says so. A few
conversations leave it nothing either, but are not cut: the last of them are held out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from llmos_jax.config.schema import DataSection
from llmos_jax.data.conversations import is_chat, read_conversations
from llmos_jax.data.document import Document, cut_end, is_held_out
from llmos_jax.data.sources import read_documents
from llmos_jax.data.spool import Spool
from llmos_jax.errors import DataError

Sides = dict[str, Spool]


def read_sides(section: DataSection, room: Path, stack: ExitStack) -> tuple[Sides, str]:
    """Return the spools `train`, `validation` and perhaps `test`, and in words how
    validation text was told apart. The spools lie in `room`; `stack` closes them."""
    if section.validation:
        sides = {
            "train": read_side(section, section.train, room / "train.txt", stack),
            "validation": read_side(
                section, section.validation, room / "validation.txt", stack
            ),
        }
        held_out_by = f"named: {', '.join(section.validation)}"
    else:
        sides, held_out_by = _split(section, room, stack)
    if section.test:
        sides["test"] = read_side(section, section.test, room / "test.txt", stack)
    return sides, held_out_by


def read_held_out(section: DataSection, room: Path, stack: ExitStack) -> Spool:
    """Return what `read_sides` holds out of the training text, alone."""
    sides, _ = _split(section, room, stack)
    sides["train"].path.unlink()
    return sides["validation"]


def _documents(section: DataSection, patterns: Sequence[str]) -> Iterable[Document]:
    if is_chat(section, patterns):
        return read_conversations(patterns, messages_key=section.messages_key)
    return read_documents(patterns, text_key=section.text_key)


def read_side(
    section: DataSection, patterns: Sequence[str], path: Path, stack: ExitStack
) -> Spool:
    """Return a spool, at `path`, of all text that the patterns name."""
    spool = stack.enter_context(Spool(path))
    for document in _documents(section, patterns):
        spool.add(document.text)
    return spool


def _split(section: DataSection, room: Path, stack: ExitStack) -> tuple[Sides, str]:
    share = section.validation_share
    if not 0 < share < 1:
        raise DataError(
            f"data.validation_share is {share:g}; it must lie between 0 and 1, or "
            "data.validation must name held-out text."
        )
    train = stack.enter_context(Spool(room / "train.txt"))
    held_out = stack.enter_context(Spool(room / "validation.txt"))
    for document in _documents(section, section.train):
        side = held_out if is_held_out(document, share) else train
        side.add(document.text)
    if train.num_documents and held_out.num_documents:
        by = f"{share:.3g} of the documents, by content hash"
        return {"train": train, "validation": held_out}, by
    # Too few documents to choose among: all fell on one side.
    whole = train if train.num_documents else held_out
    if is_chat(section, section.train):
        by = f"the last {share:.3g} of the conversations (too few to choose among)"
        return _split_last(whole, share, room, stack), by
    by = f"the last {share:.3g} of each document (too few documents to choose among)"
    return _split_ends(whole, share, room, stack), by


def _split_last(whole: Spool, share: float, room: Path, stack: ExitStack) -> Sides:
    if whole.num_documents < 2:
        raise DataError(
            "one conversation is too little to hold any out. Give more, or name "
            "data.validation."
        )
    sides, aside = _aside(whole, room, stack)
    first_held_out = whole.num_documents - max(1, round(whole.num_documents * share))
    for number, text in enumerate(whole):
        sides["train" if number < first_held_out else "validation"].add(text)
    aside.unlink()
    return sides


def _split_ends(whole: Spool, share: float, room: Path, stack: ExitStack) -> Sides:
    sides, aside = _aside(whole, room, stack)
    for text in whole:
        for spool, part in zip(sides.values(), cut_end(text, share)):
            if part.strip():
                spool.add(part)
    aside.unlink()
    if not all(spool.num_documents for spool in sides.values()):
        raise DataError(
            f"{whole.num_bytes} bytes of text in {whole.num_documents} documents are "
            "too little to hold any out. Give more text, or name data.validation."
        )
    return sides


def _aside(whole: Spool, room: Path, stack: ExitStack) -> tuple[Sides, Path]:
    """Move a spool out of the way of the two that it is told apart into."""
    aside = room / "whole.txt"
    whole.path.rename(aside)
    names = ("train", "validation")
    sides = {name: stack.enter_context(Spool(room / f"{name}.txt")) for name in names}
    return sides, aside
