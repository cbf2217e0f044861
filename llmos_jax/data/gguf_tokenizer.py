"""Turn the vocabulary inside a GGUF file into a Tokenizer.

GGUF keeps tokens, their types, and merges or scores; how text is cut before merging is
only named (`tokenizer.ggml.pre`). The rules behind the names are those of llama.cpp
(src/llama-vocab.cpp, llm_tokenizer_bpe), which match the tokenizer.json files that the
models were published with. Of these `transformers` 5.23 does not know `smollm`: its
reading of SmolLM2's GGUF file takes two spaces before a digit for two tokens, where the
model was trained with one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from llmos_jax.data.marks import Marks, marks_of, set_frame
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.errors import ConfigError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""`tokenizer.ggml.token_type`."""

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

_ROLES = {  # tokenizer_config.json's names to GGUF's
    "bos_token": "bos",
    "eos_token": "eos",
    "unk_token": "unknown",
    "pad_token": "padding",
    "eot_token": "eot",
    "eom_token": "eom",
}
_ENDS = ("eot_token", "eom_token")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>")
"""Marks that end a turn wherever a template writes them; as llama.cpp, by name."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
QWEN2_SPLIT = rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_REST}"
DEFAULT_SPLITS = (r"[\p{P}\$\+<=>\^~\|]+", r"\p{N}+", r"[0-9][0-9][0-9]")
"""Before and after GPT-2's own rule; what files without a name are cut by."""

_PRE = {
    "llama-bpe": "llama-bpe",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "smollm": "smollm",
    "gpt-2": "gpt-2",
    "default": "default",
}


def tokenizer_of_gguf(fields: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer that a GGUF file's metadata describes.

    Args:
        fields: the file's metadata by key, arrays as lists.

    Raises:
        ConfigError: there is none, it is of a kind that is not known here, or its parts
            do not fit together.
    """
    kind = _need(fields, "model", str)
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"the file's tokenizer is a {kind!r} one (tokenizer.ggml.model); `gpt2` "
            "(byte-level BPE) and `llama` (SentencePiece BPE) can be read."
        )
    tokens = _need(fields, "tokens", list)
    types = fields.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
    if len(types) != len(tokens):
        raise ConfigError(
            f"the file has {len(tokens)} tokens and the types of {len(types)}."
        )
    try:
        inner = (_byte_level if kind == "gpt2" else _sentencepiece)(fields, tokens)
        _add_marks(inner, inner_tokens(fields, tokens), types)
        marks = _marks(fields, tokens) or marks_of(inner)
        if fields.get("tokenizer.ggml.add_eos_token", False):
            set_frame(inner, [], [marks.eos_id])
    except ConfigError:
        raise
    except Exception as problem:  # the library raises bare Exception
        raise ConfigError(f"the file's tokenizer makes no sense: {problem}") from None
    return Tokenizer(inner, marks)


def begins_with_mark(fields: Mapping[str, Any]) -> bool:
    """Whether the model wants its first mark before each text."""
    is_llama3 = _PRE.get(fields.get("tokenizer.ggml.pre", "")) == "llama-bpe"
    by_kind = fields.get("tokenizer.ggml.model") == "llama" or is_llama3
    return bool(fields.get("tokenizer.ggml.add_bos_token", by_kind))


def inner_tokens(fields: Mapping[str, Any], tokens: Sequence[str]) -> list[str]:
    """Return tokens as the merges spell them: SentencePiece files keep runs of spaces
    as they are, and everything else with SPACE."""
    if fields.get("tokenizer.ggml.model") != "llama":
        return list(tokens)
    return [SPACE * len(one) if one and not one.strip(" ") else one for one in tokens]


def pre_tokenizer_of(name: str) -> pre_tokenizers.PreTokenizer:
    """Return how text is cut under a name of `tokenizer.ggml.pre`; ConfigError if it is
    not known."""
    if name not in _PRE:
        raise ConfigError(
            f"the file's tokenizer cuts text by the rule {name!r} "
            f"(tokenizer.ggml.pre); known are {', '.join(_PRE)}."
        )
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    rule = _PRE[name]
    if rule == "gpt-2":
        return gpt2
    if rule == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        return pre_tokenizers.Sequence([digits, gpt2])
    if rule == "default":
        # GPT-2's rule comes second, and turns what it cuts into bytes' symbols; digits
        # are their own symbols, so those that follow cut as they would before.
        splits = [_isolated(one) for one in DEFAULT_SPLITS]
        return pre_tokenizers.Sequence([splits[0], gpt2, *splits[1:]])
    split = _isolated(LLAMA3_SPLIT if rule == "llama-bpe" else QWEN2_SPLIT)
    return pre_tokenizers.Sequence([split, to_bytes])


def merges_of_scores(
    tokens: Sequence[str], scores: Sequence[float]
) -> list[tuple[str, str]]:
    """Return the pairs that make each token, best token first.

    SentencePiece merges whichever neighbours make the token of the highest score; BPE
    has a list of pairs instead. Among pairs that make one token, those with the longer
    left part come first, as in the tokenizer.json files that `transformers` converts.
    """
    ids = {token: index for index, token in enumerate(tokens)}
    ranked: list[tuple[float, int, int, str, str]] = []
    for index, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[index], -cut, index, left, right))
    ranked.sort(key=lambda one: one[:3])
    return [(left, right) for *_, left, right in ranked]


def _byte_level(
    fields: Mapping[str, Any], tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    merges = []
    for merge in _need(fields, "merges", list):
        left, space, right = merge.partition(" ")
        if not space:
            raise ConfigError(f"the file's tokenizer has the merge {merge!r}: no pair.")
        merges.append((left, right))
    pre = fields.get("tokenizer.ggml.pre", "default")
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            # Llama 3's tokenizer.json: a word that is a token is taken as it is.
            ignore_merges=_PRE.get(pre) == "llama-bpe",
        )
    )
    if _PRE.get(pre) == "qwen2":
        inner.normalizer = normalizers.NFC()  # as published; llama.cpp leaves it out
    inner.pre_tokenizer = pre_tokenizer_of(pre)
    inner.decoder = decoders.ByteLevel()
    return inner


def _sentencepiece(
    fields: Mapping[str, Any], tokens: Sequence[str]
) -> tokenizers.Tokenizer:
    spelled = inner_tokens(fields, tokens)
    merges = fields.get("tokenizer.ggml.merges")
    if merges is not None:
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    elif str(fields.get("general.architecture", "")).startswith("gemma"):
        # Gemma's scores rank the runs of spaces and newlines last, its published
        # tokenizer.json ranks by place, as here.
        pairs = merges_of_scores(spelled, [-float(at) for at in range(len(spelled))])
    else:
        pairs = merges_of_scores(spelled, _need(fields, "scores", list))
    unknown = fields.get("tokenizer.ggml.unknown_token_id")
    inner = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(spelled)},
            merges=pairs,
            unk_token=None if unknown is None else _token(tokens, unknown),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if fields.get("tokenizer.ggml.add_space_prefix", True):
        inner.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
        steps.append(decoders.Strip(content=" ", left=1))
    else:
        inner.normalizer = normalizers.Replace(" ", SPACE)
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    inner.decoder = decoders.Sequence(steps)
    return inner


def _add_marks(
    inner: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]
) -> None:
    """Tell the library which tokens are never made by merging."""
    marks, whole = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            marks.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED and token.strip(SPACE):
            # Runs of spaces are reached by merging, and found in text only as spaces.
            whole.append(AddedToken(token, normalized=False, special=False))
    inner.add_special_tokens(marks)
    inner.add_tokens(whole)


def _marks(fields: Mapping[str, Any], tokens: Sequence[str]) -> Marks | None:
    """Return what frames text; None if the file does not name what ends one."""
    ids = {
        role: fields[f"tokenizer.ggml.{key}_token_id"]
        for role, key in _ROLES.items()
        if f"tokenizer.ggml.{key}_token_id" in fields
    }
    config: dict[str, Any] = {role: _token(tokens, one) for role, one in ids.items()}
    if "eos_token" not in ids:
        return None
    template = fields.get("tokenizer.chat_template")
    adds_bos = begins_with_mark(fields) and "bos_token" in ids
    stops = {ids["eos_token"], *(ids[one] for one in _ENDS if one in ids)}
    types = fields.get("tokenizer.ggml.token_type", ())
    for name in _TURN_ENDS:
        if isinstance(template, str) and name in template and name in tokens:
            found = tokens.index(name)
            stops |= {found} if types[found : found + 1] == [CONTROL] else set()
    return Marks(
        bos_id=ids.get("bos_token"),
        eos_id=ids["eos_token"],
        stop_ids=frozenset(stops),
        adds_bos=adds_bos,
        chat_template=template,
        config={
            **{role: one for role, one in config.items() if role not in _ENDS},
            "add_bos_token": adds_bos,
        },
    )


def _isolated(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _token(tokens: Sequence[str], index: Any) -> str:
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise ConfigError(f"the file's tokenizer names token {index} of {len(tokens)}.")
    return tokens[index]


def _need(fields: Mapping[str, Any], key: str, kind: type) -> Any:
    found = fields.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, kind):
        raise ConfigError(
            f"the file holds no tokenizer that can be read: tokenizer.ggml.{key} is "
            f"{'missing' if found is None else f'a {type(found).__name__}'}."
        )
    return found
