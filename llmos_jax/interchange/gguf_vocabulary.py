"""Turn a tokenizer into the metadata of a GGUF file.

GGUF names the rule by which text is cut before merging; the name is found by comparing
the tokenizer's own pre-tokenizer, part by part, with the rules behind each name
(data/gguf_tokenizer.py). A tokenizer that cuts otherwise has no name in llama.cpp and
is refused, as it would be read as another.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import models

from llmos_jax.data import Tokenizer
from llmos_jax.data.gguf_tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    pre_tokenizer_of,
)
from llmos_jax.errors import ConfigError

_RULES = ("llama-bpe", "qwen2", "smollm", "gpt-2", "default")
_IDLE = ("trim_offsets",)
"""Settings of a pre-tokenizer that change no token."""
_APART = -1000.0
"""Score of a token that is never merged; as in Gemma's files."""
_NEVER = -1e9
"""Score of a token that no merge makes."""


def fields_of_tokenizer(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """Return the `tokenizer.` fields for a model of `vocab_size` rows; rows beyond the
    tokenizer's are given names of their own.

    Raises:
        ConfigError: llama.cpp has no tokenizer that does the same, or there are more
            tokens than rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, and the model rows for "
            f"{vocab_size}."
        )
    page = json.loads(tokenizer.to_json())
    model = page["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise ConfigError(
            f"the tokenizer is a {model['type']} with {len(model.get('merges', ()))} "
            "merges; a GGUF file holds BPE with merges. Write a Hugging Face folder."
        )
    tokens, types = _tokens(tokenizer, page, vocab_size)
    if model["byte_fallback"]:
        kind = _sentencepiece(page, tokens, types)
    else:
        kind = {
            "model": "gpt2",
            "pre": _rule_of(page),
            "merges": [" ".join(pair) for pair in _pairs(model)],
        }
    fields = {
        **kind,
        "tokens": tokens,
        "token_type": types,
        **_marks(tokenizer, tokens),
    }
    result = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    if tokenizer.marks.chat_template is not None:
        result["tokenizer.chat_template"] = tokenizer.marks.chat_template
    return result


def _tokens(
    tokenizer: Tokenizer, page: Mapping[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in tokenizer.vocabulary().items():
        tokens[index], types[index] = token, NORMAL
    for added in page["added_tokens"]:
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _sentencepiece(
    page: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, Any]:
    """Name the types, spell runs of spaces as SentencePiece does, and score."""
    model = page["model"]
    scores = _scores(_pairs(model), tokens, types)
    for index, token in enumerate(tokens):
        if types[index] == NORMAL and _is_byte(token):
            types[index], scores[index] = BYTE, 0.0
        elif types[index] == CONTROL and token == model["unk_token"]:
            types[index] = UNKNOWN
        elif types[index] == USER_DEFINED:
            tokens[index] = token.replace(SPACE, " ")
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "add_space_prefix": _begins_with_space(page),
    }


def _scores(
    pairs: Sequence[tuple[str, str]], tokens: Sequence[str], types: Sequence[int]
) -> list[float]:
    """Rank tokens by the first merge that makes them: llama.cpp merges whichever
    neighbours make the token of the highest score."""
    made = dict.fromkeys(left + right for left, right in pairs)
    rank = {token: -float(place) for place, token in enumerate(made)}
    return [
        rank.get(token, _NEVER) if kind == NORMAL else _APART
        for token, kind in zip(tokens, types, strict=True)
    ]


def _begins_with_space(page: Mapping[str, Any]) -> bool:
    """Whether text is given a space in front; ConfigError if spaces are handled in a
    way that SentencePiece has not."""
    steps = [*_flat(page["normalizer"]), *_flat(page["pre_tokenizer"])]
    prefixed = False
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            prefixed = True
        elif kind == "Metaspace" and step["replacement"] == SPACE:
            prefixed |= step["prepend_scheme"] != "never"
        elif kind == "Replace":
            if (step["pattern"], step["content"]) != ({"String": " "}, SPACE):
                raise _no_such(kind)
        elif kind != "Split" or step["pattern"] != {"String": " "}:
            raise _no_such(kind)  # such a split finds no space: they are replaced
    return prefixed


def _rule_of(page: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of how text is cut."""
    for step in _flat(page["normalizer"]):
        if step["type"] != "NFC":  # Qwen's; llama.cpp leaves it out
            raise _no_such(step["type"])
    ours = _bare(page["pre_tokenizer"])
    for name in _RULES:
        known = tokenizers.Tokenizer(models.BPE())
        known.pre_tokenizer = pre_tokenizer_of(name)
        if _bare(json.loads(known.to_str())["pre_tokenizer"]) == ours:
            return name
    raise _no_such(" and ".join(step["type"] for step in ours) or "no pre-tokenizer")


def _bare(step: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in one.items() if key not in _IDLE}
        for one in _flat(step)
    ]


def _flat(step: Mapping[str, Any] | None) -> Iterator[Mapping[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, those of a sequence singly."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for one in step.get("normalizers", step.get("pretokenizers", ())):
        yield from _flat(one)


def _marks(tokenizer: Tokenizer, tokens: Sequence[str]) -> dict[str, Any]:
    marks = tokenizer.marks
    fields: dict[str, Any] = {
        "add_bos_token": marks.adds_bos,
        "eos_token_id": marks.eos_id,
    }
    if marks.bos_id is not None:
        fields["bos_token_id"] = marks.bos_id
    names = tokenizer.special_names()
    for role, key in (("unk_token", "unknown"), ("pad_token", "padding")):
        if names.get(role) in tokens:
            fields[f"{key}_token_id"] = tokens.index(names[role])
    others = sorted(marks.stop_ids - {marks.eos_id})
    for key, index in zip(("eot", "eom"), others, strict=False):
        fields[f"{key}_token_id"] = index
    return fields


def _pairs(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return merges; files before 2024-11 join them by a space."""
    pairs = (
        one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"]
    )
    return [(left, right) for left, right in pairs]


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _no_such(what: str) -> ConfigError:
    return ConfigError(
        f"llama.cpp has no tokenizer that cuts text as this one does ({what}), so a "
        "GGUF file would be read wrongly. Write a Hugging Face folder."
    )
