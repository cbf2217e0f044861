"""Guess the next tokens from the ones that are there: speculation by prompt lookup.

Where the last few tokens stood before, what followed them then may follow again
(arXiv 2304.04487; prompt lookup decoding). Guesses cost one step to check, all at once,
and wrong ones are thrown away: what a request says never depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that must be equal, tried in this order: a judgement; one token alone repeats
by chance."""
_REACH = 4096
"""Tokens back that are searched: a judgement; it takes microseconds."""


def guessed(tokens: Sequence[int], count: int) -> list[int]:
    """Return up to `count` tokens that followed the latest earlier place like the end.

    Args:
        tokens: of the sequence.
        count: the most.
    """
    recent = list(tokens[-_REACH:])
    for length in range(LONGEST, SHORTEST - 1, -1):
        end = recent[-length:]
        for start in range(len(recent) - length - 1, -1, -1):
            if recent[start] == end[0] and recent[start : start + length] == end:
                return recent[start + length : start + length + count]
    return []
