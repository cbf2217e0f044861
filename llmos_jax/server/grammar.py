"""Turn a JSON schema, a regular expression or a Lark grammar into masks of tokens.

llguidance does the work; what is added here is time. Its own limits stop what grows
with the answer, but not the intersections (`allOf`, `multipleOf`, `&`) that it looks
through for emptiness when a grammar is built: a schema of a few lines can keep it busy
for hours, and no thread can be stopped. So each new grammar is tried out in a process
of its own first, which can be.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import llguidance
import numpy as np

from llmos_jax.data import Tokenizer
from llmos_jax.errors import ConfigError

Kind = Literal["json_schema", "json_object", "regex", "lark"]

MOST_CHARACTERS = 1 << 17
"""Of a grammar's text; OpenAI takes schemas whose names and values have 120,000
(platform.openai.com/docs/guides/structured-outputs, limits)."""
TRIAL_S = 5.0
"""A judgement: a schema of 3,000 properties takes one second."""
_TRIAL_BYTES = 2 << 30
_MOST_KEPT = 64
# Between JSON's marks: nothing, a space, or a new line and its indent. With more, a
# model can write white space until its tokens are used up.
WHITESPACE = r"( |\n[ \t]{0,64})"
_NAMES: dict[Kind, str] = {
    "json_schema": "JSON schema",
    "json_object": "JSON",
    "regex": "regular expression",
    "lark": "Lark grammar",
}
_TRIAL = Path(__file__).with_name("trial.py")


class Grammars:
    """Compiles grammars for one tokenizer; threads may share it.

    The first grammar waits for `prepare`: seconds for a large vocabulary.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """
        Args:
            tokenizer: whose tokens the masks are of.
            vocab_size: V of the model, at least the tokenizer's; tokens that the
                tokenizer lacks are never allowed.
        """
        assert vocab_size >= tokenizer.vocab_size, "a row for each token"
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[Kind, str], llguidance.LLMatcher] = OrderedDict()

    def prepare(self) -> None:
        """Read the vocabulary; ConfigError for a tokenizer that cannot be used."""
        self._theirs  # noqa: B018

    @functools.cached_property
    def marks(self) -> Mapping[str, int]:
        """Tokens that no text spells: a grammar says `<[id]>` for each of them."""
        return {
            name: token
            for name, token in self._tokenizer.vocabulary().items()
            if self._theirs.is_special_token(token)
        }

    def compile(self, kind: Kind, text: str) -> TokenGrammar:
        """Return the grammar of one request, at its beginning.

        Args:
            kind: what `text` is; of a json_object it is not read.

        Raises:
            ConfigError: it is wrong, too large, takes too long, or nothing matches.
        """
        key = (kind, "" if kind == "json_object" else text)
        with self._lock:
            matcher = self._kept.get(key)
        if matcher is None:
            matcher = self._build(kind, key[1])
        with self._lock:
            self._kept[key] = matcher
            self._kept.move_to_end(key)
            if len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            own = matcher.deep_copy()
        return TokenGrammar(own, self._tokenizer)

    def _build(self, kind: Kind, text: str) -> llguidance.LLMatcher:
        grammar = _their_grammar(kind, text)
        if kind != "json_object":
            _try_out(kind, grammar, self._tokenizer.vocab_size)
        matcher = llguidance.LLMatcher(
            self._theirs, grammar, log_level=0, limits=_limits()
        )
        if matcher.is_error():
            raise _refusal(kind, matcher.get_error())
        trial = TokenGrammar(matcher.deep_copy(), self._tokenizer)
        mask = np.zeros(-(-self._tokenizer.vocab_size // 32), np.uint32)
        try:
            trial.fill(mask)
        except ConfigError:
            raise _refusal(kind, "nothing matches it") from None
        return matcher

    @functools.cached_property
    def _theirs(self) -> llguidance.LLTokenizer:
        plain = json.loads(self._tokenizer.to_json())
        plain.pop("llmos", None)
        try:
            return llguidance.LLTokenizer(
                json.dumps(plain),
                n_vocab=self._tokenizer.vocab_size,
                eos_token=sorted(self._tokenizer.stop_ids),
            )
        except ValueError as problem:
            raise ConfigError(
                "answers of a given form are not possible with this model's "
                f"tokenizer: {_reason(str(problem))}. Ask without response_format."
            ) from None


class TokenGrammar:
    """`scheduling.Grammar` of one request."""

    __slots__ = ("_ended", "_matcher", "_stop_ids", "_words")

    def __init__(self, matcher: llguidance.LLMatcher, tokenizer: Tokenizer):
        self._matcher = matcher
        self._stop_ids = np.array(sorted(tokenizer.stop_ids))
        self._words = -(-tokenizer.vocab_size // 32)
        self._ended = False

    def fill(self, mask: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, and clear all others.

        Args:
            mask: uint32 [ceil(V / 32)], contiguous.

        Raises:
            ConfigError: the grammar has become too much to follow.
        """
        mask[:] = 0
        if not self._ended:
            known = mask[: self._words]
            self._matcher.unsafe_compute_mask_ptr(known.ctypes.data, known.nbytes)
            self._check()
        if self.may_end:
            words, bits = self._stop_ids // 32, self._stop_ids % 32
            np.bitwise_or.at(mask, words, np.uint32(1) << bits.astype(np.uint32))

    def take(self, token: int) -> None:
        """Go on by a token that `fill` allowed; after a stop token only stop tokens
        may come."""
        if self.may_end and token in self._stop_ids:
            self._ended = True
            return
        self._matcher.consume_token(int(token))
        self._check()

    @property
    def may_end(self) -> bool:
        """Whether what was taken is a whole answer."""
        return self._ended or bool(self._matcher.is_accepting())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ConfigError(
                "the answer's grammar cannot be followed any further: "
                f"{_reason(self._matcher.get_error())}. Ask for a simpler form."
            )


def _limits() -> llguidance.LLParserLimits:
    return llguidance.LLParserLimits(verbose_errors=False)


def _their_grammar(kind: Kind, text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(
            f"a {kind} has {len(text)} characters; at most {MOST_CHARACTERS} are read."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal(kind, "it cannot be written as UTF-8") from None
    matcher = llguidance.LLMatcher
    if kind == "regex":
        return matcher.grammar_from_regex(text)
    if kind == "lark":
        return matcher.grammar_from_lark(text)
    schema = text if kind == "json_schema" else '{"type": "object"}'
    try:
        if not isinstance(json.loads(schema), dict):
            raise ValueError("it is not an object")
        return matcher.grammar_from_json_schema(
            schema, overrides={"whitespace_pattern": WHITESPACE}
        )
    except (ValueError, RecursionError) as problem:
        raise _refusal(kind, str(problem)) from None


def _try_out(kind: Kind, grammar: str, vocab_size: int) -> None:
    """Raise ConfigError if a process of its own finds a fault, or no end."""
    size = vocab_size if kind == "lark" else 0  # only Lark speaks of token ids
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(_TRIAL), str(size), str(_TRIAL_BYTES)],
            input=grammar.encode(),
            capture_output=True,
            timeout=TRIAL_S,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(
            kind, f"it takes more than {TRIAL_S:g} s to make ready"
        ) from None
    if done.returncode:
        raise _refusal(kind, "it takes more memory than any form should")
    found = done.stdout.decode(errors="replace")
    if found:
        raise _refusal(kind, found)


def _refusal(kind: Kind, problem: str) -> ConfigError:
    if problem.startswith("NoExtension"):
        problem = "nothing matches it"
    return ConfigError(f"this {_NAMES[kind]} cannot be used: {_reason(problem)}.")


def _reason(problem: str) -> str:
    """Their words, in one line without what they quote."""
    fault = re.search(r"^error: (.*)$", problem, re.M)
    first = fault[1] if fault else problem.strip().partition("\n")[0]
    return first.partition("; following special tokens")[0].rstrip(". ")[:200]
