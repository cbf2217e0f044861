"""Read the text of each side once: training, validation and, where named, test.

Validation text is what the config names, or a share of the training documents chosen by
content hash. A few long files leave a hash nothing to choose from (one file is one
document): then the end of each document is held out, and the report says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from llmos_jax.config.schema import DataSection
from llmos_jax.data.document import cut_end, is_held_out
from llmos_jax.data.sources import read_documents
from llmos_jax.data.spool import Spool
from llmos_jax.errors import DataError

Sides = dict[str, Spool]


def read_sides(section: DataSection, room: Path, stack: ExitStack) -> tuple[Sides, str]:
    """Return the spools `train`, `validation` and perhaps `test`, and in words how
    validation text was told apart. The spools lie in `room`; `stack` closes them."""
    if section.validation:
        sides = {
            "train": _read(section, section.train, room / "train.txt", stack),
            "validation": _read(
                section, section.validation, room / "validation.txt", stack
            ),
        }
        held_out_by = f"named: {', '.join(section.validation)}"
    else:
        sides, held_out_by = _split(section, room, stack)
    if section.test:
        sides["test"] = _read(section, section.test, room / "test.txt", stack)
    return sides, held_out_by


def read_scored(
    section: DataSection, room: Path, stack: ExitStack
) -> tuple[str, Spool]:
    """Return the side to score a finished model on, by name: test text if it is named,
    else validation text, named or held out of the training text as in `read_sides`."""
    if section.test:
        return "test", _read(section, section.test, room / "test.txt", stack)
    if section.validation:
        path = room / "validation.txt"
        return "validation", _read(section, section.validation, path, stack)
    sides, _ = _split(section, room, stack)
    sides["train"].path.unlink()
    return "validation", sides["validation"]


def _read(
    section: DataSection, patterns: Sequence[str], path: Path, stack: ExitStack
) -> Spool:
    spool = stack.enter_context(Spool(path))
    for document in read_documents(patterns, text_key=section.text_key):
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
    for document in read_documents(section.train, text_key=section.text_key):
        side = held_out if is_held_out(document, share) else train
        side.add(document.text)
    if train.num_documents and held_out.num_documents:
        by = f"{share:.3g} of the documents, by content hash"
        return {"train": train, "validation": held_out}, by
    # Too few documents to choose among: all fell on one side.
    whole = train if train.num_documents else held_out
    by = f"the last {share:.3g} of each document (too few documents to choose among)"
    return _split_ends(whole, share, room, stack), by


def _split_ends(whole: Spool, share: float, room: Path, stack: ExitStack) -> Sides:
    aside = room / "whole.txt"
    whole.path.rename(aside)
    train = stack.enter_context(Spool(room / "train.txt"))
    held_out = stack.enter_context(Spool(room / "validation.txt"))
    for text in whole:
        for spool, part in zip((train, held_out), cut_end(text, share)):
            if part.strip():
                spool.add(part)
    aside.unlink()
    if not (train.num_documents and held_out.num_documents):
        raise DataError(
            f"{whole.num_bytes} bytes of text in {whole.num_documents} documents are "
            "too little to hold any out. Give more text, or name data.validation."
        )
    return {"train": train, "validation": held_out}
