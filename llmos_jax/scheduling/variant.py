"""What a program can choose tokens by: one of three, so programs can be counted."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from llmos_jax.scheduling.request import Request


class Variant(NamedTuple):
    """The parts of choosing that a program has; each variant is another program."""

    name: str
    draws: bool
    penalizes: bool
    masks: bool
    tells: bool


PLAIN = Variant("plain", draws=False, penalizes=False, masks=False, tells=False)
"""Takes the likeliest token."""
DRAWN = Variant("drawn", draws=True, penalizes=False, masks=False, tells=False)
"""Draws, from all tokens or from the likely ones."""
FULL = Variant("full", draws=True, penalizes=True, masks=True, tells=True)
"""All that a request can ask for."""
VARIANTS = (PLAIN, DRAWN, FULL)


def variant_of(requests: Iterable[Request]) -> Variant:
    """The smallest that serves them all."""
    return VARIANTS[max(map(_rank, requests), default=0)]


def _rank(request: Request) -> int:
    asks = request.sampling
    is_full = (
        asks.penalizes
        or bool(asks.logit_bias)
        or request.alternatives is not None
        or request.grammar is not None
    )
    return 2 if is_full else int(asks.draws)
