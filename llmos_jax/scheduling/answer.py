"""What a device drew becomes an answer: which tokens count, and where it ends."""

from __future__ import annotations

from llmos_jax.errors import LlmosError
from llmos_jax.scheduling.request import FinishReason, Grammar
from llmos_jax.scheduling.sequence import Sequence
from llmos_jax.scheduling.work import NO_TOKEN, NOT_A_NUMBER, Part


def confirmed(part: Part, drawn: tuple[int, ...]) -> tuple[int, ...]:
    """What was drawn, up to and with the first token that was guessed otherwise."""
    if part.tokens is None or part.draws <= 1:
        return drawn
    guess = part.tokens[1:]
    for index, token in enumerate(guess):
        if drawn[index] != token:
            return drawn[: index + 1]
    return drawn


def append(
    sequence: Sequence, tokens: tuple[int, ...]
) -> tuple[FinishReason | None, str]:
    """Let a sequence grow, up to its end; return why it ended, and what was wrong."""
    request = sequence.request
    for token in tokens:
        if token == NO_TOKEN:
            break
        if token == NOT_A_NUMBER:
            return "failed", no_number(len(sequence.tokens))
        if token in request.stop_ids:
            return "stop", ""
        sequence.tokens.append(token)
        problem = _told(request.grammar, token)
        if problem:
            return "failed", problem
        if len(sequence.tokens) == sequence.limit:
            return "length", ""
    return None, ""


def _told(grammar: Grammar | None, token: int) -> str:
    """Let a grammar go on by a token; return what it cannot bear."""
    try:
        if grammar is not None:
            grammar.take(token)
    except LlmosError as problem:
        return str(problem)
    return ""


def no_number(place: int) -> str:
    return (
        f"the model's numbers for token {place} are not finite (NaN or infinity): its "
        "weights are damaged, or too large for the dtype it computes in"
    )
