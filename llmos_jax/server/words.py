"""Turn the tokens of one answer into text that may be sent.

Text waits while it could be the beginning of a stop string, and a token waits for its
text; where a stop string comes, the answer ends before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from llmos_jax.data import StreamDecoder, Tokenizer
from llmos_jax.scheduling import Likelihood


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """A token of an answer."""

    token: int
    begin: int
    """Characters of the answer before its text."""
    likelihood: Likelihood | None


class Words:
    """The text of one answer as it grows."""

    __slots__ = (
        "_decoder", "_held", "_made", "_sent", "_shown", "_stops", "_waiting",
        "stopped",
    )  # fmt: skip

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...] = (),
        shown: Mapping[int, str] | None = None,
    ):
        """
        Args:
            tokenizer: whose tokens come.
            stops: strings that end the answer.
            shown: marks that are text here, by token.
        """
        self._decoder = StreamDecoder(tokenizer)
        self._stops = stops
        self._shown = shown or {}
        self._held = ""
        self._made = 0
        self._sent = 0
        self._waiting: deque[tuple[int, Said]] = deque()
        self.stopped = False
        """Whether a stop string came; nothing more is said then."""

    def push(
        self, token: int, likelihood: Likelihood | None = None
    ) -> tuple[str, list[Said]]:
        """Take a token; return the text, and the tokens, that may be sent now."""
        if self.stopped:
            return "", []
        if token in self._shown:
            text = self._decoder.flush() + self._shown[token]
        else:
            text = self._decoder.push(token)
        said = Said(token=token, begin=self._made, likelihood=likelihood)
        self._made += len(text)
        self._waiting.append((self._made, said))
        return self._more(text)

    def flush(self) -> tuple[str, list[Said]]:
        """Return what still waits: no more tokens come."""
        if self.stopped:
            return "", []
        rest = self._decoder.flush()
        self._made += len(rest)
        text, said = self._more(rest)
        if self.stopped:
            return text, said
        text, self._held = text + self._held, ""
        said += [one for _, one in self._waiting]
        self._waiting.clear()
        return text, said

    def _more(self, text: str) -> tuple[str, list[Said]]:
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = held[: min(found)], ""
            self._sent += len(shown)
            said = [one for _, one in self._waiting if one.begin < self._sent]
            self._waiting.clear()
            return shown, said
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        shown, self._held = held[: len(held) - keep], held[len(held) - keep :]
        self._sent += len(shown)
        said = []
        while self._waiting and self._waiting[0][0] <= self._sent:
            said.append(self._waiting.popleft()[1])
        return shown, said


class TokenNames:
    """The text of single tokens, as they read in the middle of a text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._anchor = int(tokenizer.encode("a")[-1])
        self._before = len(tokenizer.decode([self._anchor]))
        self._names: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._names:
            pair = self._tokenizer.decode([self._anchor, token])
            self._names[token] = pair[self._before :]
        return self._names[token]

    def bytes(self, token: int) -> list[int] | None:
        """Return its bytes, or None where it is a part of a character."""
        name = self[token]
        return None if "\ufffd" in name else list(name.encode())


def _overlap(text: str, stop: str) -> int:
    """The longest end of a text that a stop string begins with."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
