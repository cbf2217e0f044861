"""The facts about a vocabulary that its tokenizer.json does not say, or says in code.

Which token begins a text, which end it, whether the model wants the first written in
front of every text, and the template that turns a conversation into text. They travel
with the tokenizer: into checkpoints, and out again into a Hugging Face folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

import tokenizers
from tokenizers import processors

from llmos_jax.errors import ConfigError

END_OF_TEXT = "<|endoftext|>"
_END_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<|im_end|>", "<eos>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Marks:
    """The tokens that frame text, by id, and the template that frames turns."""

    bos_id: int | None
    """What begins a text; None where the vocabulary has no such token."""
    eos_id: int
    """What ends a text."""
    stop_ids: frozenset[int]
    """Where generation ends: `eos_id`, and what generation_config.json adds to it."""
    adds_bos: bool
    """Whether the model expects `bos_id` in front of every text."""
    chat_template: str | None = None
    """Jinja source; None for a model that was not taught to converse."""
    config: dict[str, Any] = field(default_factory=dict)
    """The tokenizer_config.json that it came with, without the template."""

    def __post_init__(self) -> None:
        assert not self.adds_bos or self.bos_id is not None, "bos to add"
        assert self.eos_id in self.stop_ids, "eos among the stops"

    def to_plain(self) -> dict[str, Any]:
        """Return what JSON can hold."""
        plain = {one.name: getattr(self, one.name) for one in fields(self)}
        return {**plain, "stop_ids": sorted(self.stop_ids)}

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Marks:
        """Rebuild from `to_plain`; ConfigError if it is something else."""
        try:
            return cls(**{**plain, "stop_ids": frozenset(plain["stop_ids"])})
        except (TypeError, KeyError, AssertionError) as problem:
            raise ConfigError(
                f"the tokenizer's marks cannot be read: {problem!r}."
            ) from None


def marks_of(inner: tokenizers.Tokenizer) -> Marks:
    """Return what a tokenizer.json alone tells: the end mark is known by its name."""
    for name in _END_NAMES:
        eos_id = inner.token_to_id(name)
        if eos_id is not None:
            before, _ = frame_of(inner)
            return Marks(
                bos_id=before[-1] if before else None,
                eos_id=eos_id,
                stop_ids=frozenset({eos_id}),
                adds_bos=bool(before),
            )
    raise ConfigError(
        "the tokenizer has no token that ends a document; looked for "
        f"{', '.join(_END_NAMES)}. Name one as eos_token in tokenizer_config.json "
        "beside it, and give the folder."
    )


def frame_of(inner: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Return the ids that the post-processor puts before and after a text."""
    if not inner.num_special_tokens_to_add(False):
        return [], []
    plain = inner.encode("a", add_special_tokens=False).ids
    framed = inner.encode("a", add_special_tokens=True).ids
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    raise ConfigError("the tokenizer's post-processor changes the text itself.")


def set_frame(inner: tokenizers.Tokenizer, before: list[int], after: list[int]) -> None:
    """Make the post-processor put these ids before and after a text, and no others."""
    if frame_of(inner) == (before, after):
        return
    names = {token: inner.id_to_token(token) for token in (*before, *after)}
    lead, tail = ([f"{names[token]}:0" for token in part] for part in (before, after))
    # A template is written token by token where names may hold spaces or colons.
    inner.post_processor = processors.TemplateProcessing(
        single=[*lead, "$A:0", *tail],
        pair=[*lead, "$A:0", *tail, "$B:1"],
        special_tokens=[(name, token) for token, name in names.items()],
    )
