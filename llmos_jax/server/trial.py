"""Build one grammar and say what is wrong with it: a program of its own.

`grammar` runs this file by its path with the size of a vocabulary and bytes of memory
as arguments and the grammar on stdin; what is printed is llguidance's complaint. It
imports nothing of ours, so that it starts at once.
"""

from __future__ import annotations

import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper


class _Bytes:
    """256 bytes, an end, a mark, and tokens without text up to the size."""

    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256, 257)

    def __init__(self, size: int):
        self.tokens = [bytes([one]) for one in range(256)]
        self.tokens += [b"<end>", b"<mark>", *[b""] * (size - 258)]

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def _main() -> None:
    size, most_bytes = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    matcher = LLMatcher(
        LLTokenizer(TokenizerWrapper(_Bytes(size))),
        sys.stdin.buffer.read().decode(),
        log_level=0,
        limits=LLParserLimits(verbose_errors=False),
    )
    if not matcher.is_error():
        matcher.compute_bitmask()
    sys.stdout.buffer.write(matcher.get_error().encode())


if __name__ == "__main__":
    _main()
