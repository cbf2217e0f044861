"""Turn `[data]` into what a run reads: text, prepared corpora, or a mixture of both.

An entry of `data.train` that is the folder of a corpus is read where it lies. Corpora
were cut by one tokenizer, which must be the model's; other text is then cut by it, too.
With `data.weights` every entry is a source of its own, with its own held-out text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from llmos_jax.config.schema import DataSection
from llmos_jax.data.agreement import agreed_tokenizer, check_same, check_weights
from llmos_jax.data.conversations import is_chat
from llmos_jax.data.corpora import OpenCorpus, is_corpus, open_corpus
from llmos_jax.data.joined import join
from llmos_jax.data.lengths import with_lengths
from llmos_jax.data.scored import prepare_held_out, prepare_side
from llmos_jax.data.stream import TokenStream
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.data.tokens import (
    PreparedText,
    Source,
    check_template,
    prepare_text,
    train_on,
    with_template,
)
from llmos_jax.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Room:
    """What every step here needs."""

    section: DataSection
    corpora: dict[str, OpenCorpus]
    """Entries of `[data]` that are corpora."""
    cache: Path
    on_progress: Callable[[str], None]

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """Entries of data.train by source: with weights each is one, else all that is
        no corpus is one."""
        train = self.section.train
        if self.section.weights:
            return [(entry,) for entry in train]
        texts = tuple(entry for entry in train if entry not in self.corpora)
        corpora = [(entry,) for entry in train if entry in self.corpora]
        return [*([texts] if texts else []), *corpora]

    def named(
        self, side: str, entries: tuple[str, ...], tokenizer: Tokenizer
    ) -> TokenStream:
        """All text of some entries, as one side; of a corpus this side."""
        texts = tuple(entry for entry in entries if entry not in self.corpora)
        parts: list[TokenStream] = [
            _side_of(self.corpora[entry], side)
            for entry in entries
            if entry in self.corpora
        ]
        if texts:
            parts.append(
                prepare_side(
                    side,
                    texts,
                    self.section,
                    tokenizer,
                    cache=self.cache,
                    on_progress=self.on_progress,
                )
            )
        return join(tuple(parts))

    def held_out(self, group: tuple[str, ...], tokenizer: Tokenizer) -> TokenStream:
        """What a source of text holds out."""
        return prepare_held_out(
            replace(self.section, train=group),
            tokenizer,
            cache=self.cache,
            on_progress=self.on_progress,
        )


def prepare(
    section: DataSection,
    *,
    vocab_size: int,
    model_name: str,
    cache: Path,
    on_progress: Callable[[str], None],
    own: Tokenizer | None = None,
) -> PreparedText:
    """Return the tokenizer and the tokens of `[data]`, from the cache where they are.

    `own` is the tokenizer that the model came with, which `data.tokenizer = auto`
    takes. Conversations (`data.format`) give streams with weights.

    Raises:
        DataError: sources that cannot be read, or too little text; a damaged corpus.
        ConfigError: a tokenizer that cannot be read or does not fit the model or a
            corpus, weights that are none, or conversations and no template to write
            them by.
    """
    text = _prepare(section, vocab_size, model_name, cache, on_progress, own)
    if section.packing == "concat":
        return text
    train = with_lengths(text.train, cache, on_progress)
    return replace(text, train=train)


def _prepare(
    section: DataSection,
    vocab_size: int,
    model_name: str,
    cache: Path,
    on_progress: Callable[[str], None],
    own: Tokenizer | None,
) -> PreparedText:
    check_weights(section)
    room = _open_room(section, cache, on_progress)
    if not room.corpora and len(room.groups) == 1:
        return prepare_text(
            section,
            vocab_size=vocab_size,
            model_name=model_name,
            cache=cache,
            on_progress=on_progress,
            own=own,
        )
    tokenizer = agreed_tokenizer(
        section, room.corpora.values(), own, vocab_size, model_name
    ) or train_on(
        [replace(section, train=group) for group in room.groups],
        section.weights,
        vocab_size,
        cache,
        on_progress,
    )
    train, validation, by = [], [], []
    for group in room.groups:
        one = _sides(room, group, tokenizer)
        train.append(one.train)
        validation.append(one.validation)
        by.append(one.held_out_by)
    joined = join(tuple(train))
    if section.validation:
        held_out = room.named("validation", section.validation, tokenizer)
        by = [f"named: {', '.join(section.validation)}"]
    else:
        held_out = join(tuple(validation))
    names = [", ".join(group) for group in room.groups]
    weighted = zip(names, section.weights, train) if len(train) > 1 else ()
    return PreparedText(
        tokenizer=tokenizer,
        train=joined,
        validation=held_out,
        test=_test(room, tokenizer),
        held_out_by="; ".join(dict.fromkeys(by)),
        sources=tuple(
            Source(name=name, weight=weight, tokens=tokens)
            for name, weight, tokens in weighted
        ),
    )


def prepare_scored(
    section: DataSection,
    tokenizer: Tokenizer,
    *,
    cache: Path,
    on_progress: Callable[[str], None],
) -> TokenStream:
    """Return the text to score a finished model on, cut by its `tokenizer`.

    It is `data.test`, else `data.validation`, else what `data.train` holds out; of
    corpora, the test side where they have one.

    Raises:
        DataError: sources that cannot be read, or too little text.
        ConfigError: a corpus of another tokenizer; conversations, and no template to
            write them by.
    """
    room = _open_room(section, cache, on_progress)
    tokenizer = with_template(tokenizer, section)
    for one in room.corpora.values():
        check_same(tokenizer, one, "the model's tokenizer")
    if section.test:
        return room.named("test", section.test, tokenizer)
    if section.validation:
        return room.named("validation", section.validation, tokenizer)
    return join(
        tuple(
            room.corpora[group[0]].scored
            if group[0] in room.corpora
            else room.held_out(group, tokenizer)
            for group in room.groups
        )
    )


def _open_room(
    section: DataSection, cache: Path, on_progress: Callable[[str], None]
) -> _Room:
    entries = [*section.train, *section.validation, *section.test]
    corpora = {
        entry: open_corpus(entry, cache=cache, on_progress=on_progress)
        for entry in dict.fromkeys(entries)
        if is_corpus(entry)
    }
    return _Room(section=section, corpora=corpora, cache=cache, on_progress=on_progress)


def _sides(room: _Room, group: tuple[str, ...], tokenizer: Tokenizer) -> PreparedText:
    """Training and held-out text of one source; where `data.validation` names the
    latter, training text stands in for it."""
    corpus = room.corpora.get(group[0])
    if corpus is not None:
        return PreparedText(
            tokenizer=tokenizer,
            train=corpus.sides["train"],
            validation=corpus.sides["validation"],
            test=None,
            held_out_by=corpus.corpus.held_out_by,
        )
    if is_chat(room.section, group):
        check_template(tokenizer)
    if room.section.validation:
        whole = room.named("train", group, tokenizer)
        return PreparedText(
            tokenizer=tokenizer,
            train=whole,
            validation=whole,
            test=None,
            held_out_by="named",
        )
    return prepare_text(
        replace(room.section, train=group, test=(), weights=()),
        vocab_size=tokenizer.vocab_size,
        model_name="",
        cache=room.cache,
        on_progress=room.on_progress,
        given=tokenizer,
    )


def _test(room: _Room, tokenizer: Tokenizer) -> TokenStream | None:
    if room.section.test:
        return room.named("test", room.section.test, tokenizer)
    sides = [
        room.corpora[entry].sides["test"]
        for entry in room.section.train
        if entry in room.corpora and "test" in room.corpora[entry].sides
    ]
    return join(tuple(sides)) if sides else None


def _side_of(corpus: OpenCorpus, side: str) -> TokenStream:
    if side in corpus.sides:
        return corpus.sides[side]
    raise DataError(
        f"data.{side} names the corpus {corpus.name}, which has no {side} side; it has "
        f"{', '.join(corpus.sides)}."
    )
