"""Turn `[data]` of labelled rows into what training, planning and evaluation read.

Training rows without text teach nothing and are left out, which is said. Rows to score
keep them: whoever serves a classifier will be sent empty texts, and it must answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tokenizers

from llmos_jax.config.schema import DataSection
from llmos_jax.data.cache import open_or_build
from llmos_jax.data.labelled.lines import Notes
from llmos_jax.data.labelled.python_packages import PYTHON_PACKAGES
from llmos_jax.data.labelled.read import Row, read_rows
from llmos_jax.data.labelled.sides import (
    LabelledSide,
    encode_side,
    hold_out,
    num_shared,
    quoted,
    shortened,
)
from llmos_jax.data.sources import PYTHON_DOCS
from llmos_jax.data.token_file import code_digest
from llmos_jax.data.tokenizer import Tokenizer, check_vocabulary
from llmos_jax.data.tokens import TRAINER_BYTES, given_tokenizer
from llmos_jax.data.trained import train_bpe, train_words
from llmos_jax.errors import DataError
from llmos_jax.ir import fingerprint_of

WORDS = "words"
"""Of data.tokenizer: trained here, of whole words."""
_MOST_CLASSES = 0.5
"""Labels per row above which labels are taken for texts: a judgement."""
_FEW_ROWS = 20
"""Rows up to which every row may have a label of its own: a judgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledData:
    """What a classifier's run reads, and how it came about."""

    tokenizer: Tokenizer
    labels: tuple[str, ...]
    train: LabelledSide
    validation: LabelledSide
    test: LabelledSide | None
    held_out_by: str
    """How validation rows were told apart, in words for a report."""
    notes: tuple[str, ...]
    """What was repaired, left out or cut, a line each."""
    fingerprint: str

    @property
    def stats(self) -> dict[str, Any]:
        """Return plain counts for a report."""
        sides = (self.train, self.validation, self.test)
        return {
            "held_out_by": self.held_out_by,
            "tokenizer": self.tokenizer.fingerprint,
            "vocab_size": self.tokenizer.vocab_size,
            "labels": list(self.labels),
            "notes": list(self.notes),
            **{side.name: side.stats(self.labels) for side in sides if side},
        }


def labels_of(section: DataSection) -> tuple[str, ...]:
    """Return the labels of the training data, sorted: as numbers where all are.

    Raises:
        DataError: rows that cannot be read, or of one class only.
    """
    return _labels(_training_rows(own_task(section), []))


def own_task(section: DataSection) -> DataSection:
    """The task that needs no download, where the default for texts would stand."""
    is_default = section.train == (PYTHON_DOCS,)
    return replace(section, train=(PYTHON_PACKAGES,)) if is_default else section


def prepare_labelled(
    section: DataSection,
    *,
    labels: Sequence[str] = (),
    own: Tokenizer | None,
    vocab_size: int,
    model_name: str,
    seq_len: int,
    cache: Path,
    on_progress: Callable[[str], None],
) -> LabelledData:
    """Return the rows of all sides, cut into tokens.

    Args:
        section: where the rows are and how their labels are found.
        labels: names of the classes in the order of the model's outputs; (): those of
            the training data.
        own: the tokenizer that the model came with, which `data.tokenizer = auto`
            takes; else one of at most `vocab_size` tokens is trained on the training
            side.
        vocab_size: of the model `model_name`.
        model_name: for messages.
        seq_len: tokens that are kept of a text.
        cache: where a trained tokenizer is kept.
        on_progress: told what is done, and every note.

    Raises:
        DataError: rows that cannot be read, labels that training data lack, one class.
        ConfigError: a tokenizer that cannot be read or does not fit the model.
    """
    section, notes = own_task(section), list[str]()
    on_progress(f"reading {', '.join(section.train)}")
    rows = _training_rows(section, notes)
    found = _labels(rows)
    names = tuple(labels) or found
    _check_known(rows, names, "train")
    if missing := sorted(set(names) - set(found)):
        notes.append(f"no training row is {quoted(missing)}")
    train, validation, held_out_by = _split(section, rows, notes)
    test = _test_rows(section, notes)
    for side, others in (("validation", validation), ("test", test)):
        _check_known(others, names, side)
        if shared := num_shared(others, train):
            notes.append(
                f"{shared} of {len(others)} {side} texts are in the training data, too"
            )
    tokenizer, of_words = None, section.tokenizer == WORDS
    if not of_words:
        tokenizer = given_tokenizer(section.tokenizer, own)
    if tokenizer is None:
        train_one = train_words if of_words else train_bpe
        tokenizer = _trained(train_one, train, seq_len, vocab_size, cache, on_progress)
    check_vocabulary(tokenizer, vocab_size, model_name)
    sides = {"train": train, "validation": validation, "test": test}
    coded = {
        name: encode_side(name, some, tokenizer, names, seq_len, notes)
        for name, some in sides.items()
        if some or name != "test" or section.test
    }
    for note in notes:
        on_progress(note)
    return LabelledData(
        tokenizer=tokenizer,
        labels=names,
        train=coded["train"],
        validation=coded["validation"],
        test=coded.get("test"),
        held_out_by=held_out_by,
        notes=tuple(notes),
        fingerprint=fingerprint_of([one.fingerprint for one in coded.values()]),
    )


def read_to_predict(
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    labels: Sequence[str],
    needs_labels: bool = False,
) -> tuple[LabelledSide, tuple[str, ...]]:
    """Return the rows to score a finished classifier on or to predict, and what is to
    be said of them.

    They are `data.test`, else `data.validation`, else what training held out. Where
    labels are not needed a row may lack one, or have one that is not among `labels`:
    then it is None and -1.

    Raises:
        DataError: rows that cannot be read; where labels are needed, one that is not
            among `labels`.
    """
    section, notes = own_task(section), list[str]()
    known = None if needs_labels else labels
    if section.test or PYTHON_PACKAGES in section.train:
        name, rows = "test", _test_rows(section, notes, known)
    elif section.validation:
        name = "validation"
        rows = read_rows(section, section.validation, "validation", notes, known=known)
    else:
        name = "validation"
        _, rows, _ = _split(section, _training_rows(section, notes), notes)
        known = None
    if known is None:
        _check_known(rows, labels, name)
    elif without := sum(row.label is None for row in rows):
        notes.append(f"{without} of {len(rows)} {name} rows have no known label")
    side = encode_side(name, rows, tokenizer, labels, seq_len, notes)
    return side, tuple(notes)


def _training_rows(section: DataSection, notes: Notes) -> list[Row]:
    """All rows of data.train but those without text."""
    if section.weights:
        raise DataError(
            "data.weights mixes texts to learn language from; labelled rows are read "
            "once each. Leave it out."
        )
    rows = read_rows(section, section.train, "train", notes)
    kept = [row for row in rows if row.text.strip()]
    if not kept:
        raise DataError(
            f"none of the {len(rows)} rows in {', '.join(section.train)} has a text "
            f"(data.text_key is {section.text_key!r})."
        )
    if len(kept) < len(rows):
        notes.append(
            f"{len(rows) - len(kept)} of {len(rows)} training rows have no text and "
            "are left out"
        )
    return kept


def _labels(rows: Sequence[Row]) -> tuple[str, ...]:
    found = {row.label for row in rows if row.label is not None}
    where = f"the {len(rows)} rows of data.train"
    if len(found) < 2:
        raise DataError(
            f"{where} are all of one class, {quoted([*found])}; a classifier needs at "
            "least two. Check data.label_key and data.label_until, or add rows."
        )
    if len(rows) > _FEW_ROWS and len(found) > _MOST_CLASSES * len(rows):
        raise DataError(
            f"{where} have {len(found)} different labels, such as "
            f"{quoted(sorted(found), 3)}. Is data.label_key the column of labels? "
            "(Lines of `label text` begin with the label.)"
        )
    try:
        return tuple(sorted(found, key=lambda label: (int(label), label)))
    except ValueError:
        return tuple(sorted(found))


def _check_known(rows: Sequence[Row], labels: Sequence[str], side: str) -> None:
    """Refuse labels that are not among the model's."""
    known = set(labels)
    strange: dict[str, str] = {}
    for row in rows:
        if row.label is not None and row.label not in known:
            strange.setdefault(row.label, row.place)
    if not strange:
        return
    first = next(iter(strange))
    count = sum(row.label in strange for row in rows)
    remedy = (
        "Add them to classify.labels, or leave it empty"
        if side == "train"
        else f"Add such rows to data.train or take them out of data.{side}"
    )
    raise DataError(
        f"{len(strange)} of the labels of {side} rows are not among the {len(known)} "
        f"that the model learns ({quoted(sorted(known))}): {quoted([*strange])}, in "
        f"{count} rows, first {first[:40]!r} in {strange[first]}. {remedy}, or map "
        "labels with data.label_until."
    )


def _split(
    section: DataSection, rows: list[Row], notes: Notes
) -> tuple[list[Row], list[Row], str]:
    """Return training rows, validation rows, and how they were told apart."""
    if section.validation:
        named = read_rows(section, section.validation, "validation", notes)
        return rows, named, f"named: {', '.join(section.validation)}"
    train = [row for row in rows if row.group is not None]
    own = tuple(name for name in section.train if name == PYTHON_PACKAGES)
    held = read_rows(section, own[:1], "validation", notes)
    by = ["by file, of each package" for _ in own[:1]]
    if files := [row for row in rows if row.group is None]:
        rest, aside = hold_out(files, section.validation_share, notes)
        train, held = [*rest, *train], [*aside, *held]
        share = f"{section.validation_share:.3g}"
        by = [f"{share} of the rows of each class, by content hash", *by]
    return train, held, "; ".join(by)


def _test_rows(
    section: DataSection, notes: Notes, known: Sequence[str] | None = None
) -> list[Row]:
    """What data.test names, else the part of python-packages that is for tests."""
    own = tuple(name for name in section.train if name == PYTHON_PACKAGES)
    return read_rows(section, section.test or own[:1], "test", notes, known=known)


def _trained(
    train_one: Callable[[list[str], int], Tokenizer],
    rows: Sequence[Row],
    seq_len: int,
    vocab_size: int,
    cache: Path,
    on_progress: Callable[[str], None],
) -> Tokenizer:
    """Train a tokenizer on what is read of the training texts; from the cache where it
    is. Little text may give fewer tokens than asked."""
    texts, room_left = [], TRAINER_BYTES
    for row in rows:
        text = shortened(row.text, seq_len)[:room_left]
        texts.append(text.encode("utf-8", "replace").decode())
        room_left -= len(text)
    digest = fingerprint_of(texts)
    key = [code_digest(), tokenizers.__version__, vocab_size]
    key += [digest, train_one.__name__]

    def build(room: Path) -> dict[str, Any]:
        on_progress(f"training a tokenizer of {vocab_size} tokens")
        made = train_one(texts, vocab_size)
        (room / "tokenizer.json").write_text(made.to_json(), encoding="utf-8")
        return {}

    folder = cache / "tokenizers" / fingerprint_of(["labelled", *key])
    open_or_build(folder, build, on_progress)
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    return Tokenizer.from_json(text)
