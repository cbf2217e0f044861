"""A request on its way: what is known of its tokens, and where they are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llmos_jax.scheduling.pages import ROOT, Digest
from llmos_jax.scheduling.request import FinishReason, Hear, Request, Times


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Tokens 0 to `sent` - 1 have keys and values (or will, by what was sent)."""

    request: Request
    hear: Hear
    order: int
    """Smaller ones came earlier."""
    limit: int
    """The most tokens, prompt and answer."""
    tokens: list[int]
    """Prompt and answer as far as the host knows."""
    queued: float
    seat: int | None = None
    pages: list[int] = field(default_factory=list)
    sent: int = 0
    is_going: bool = False
    """Whether the device has the last of its tokens, or will draw it."""
    has_begun: bool = False
    """Whether any of its tokens were sent since it was seated."""
    drawing: int = 0
    """Tokens that were sent for and are not known yet, at most."""
    flying: int = 0
    """Works that were sent with a part of it and were not read."""
    remembered: int = 0
    """Pages that prompts can find."""
    digest: Digest = ROOT
    """Of the last of these."""
    cached_tokens: int | None = None
    """Of its prompt, found when it was first admitted; None: never admitted."""
    admitted: float | None = None
    first_token: float | None = None
    preemptions: int = 0
    reason: FinishReason | None = None
    mask: Any = None
    """uint32 [ceil(V / 32)]: what its grammar allows next."""
    total: Any = None
    """Of an embedding: the sum of features so far."""

    @property
    def prompt_tokens(self) -> int:
        """Of the request."""
        return len(self.request.prompt)

    def times(self, ended: float) -> Times:
        """When it came, began and ended."""
        return Times(
            queued=self.queued,
            admitted=self.admitted,
            first_token=self.first_token,
            ended=ended,
        )

    def is_late(self, now: float) -> bool:
        """Whether its deadline has passed."""
        deadline = self.request.deadline
        return deadline is not None and deadline <= now

    @property
    def is_ended(self) -> bool:
        """Whether nothing more is to be done for it."""
        return self.reason is not None

    @property
    def to_prefill(self) -> int:
        """Known tokens without keys and values; 0 once a token was sent for."""
        return 0 if self.is_going else len(self.tokens) - self.sent

    @property
    def wants_host(self) -> bool:
        """Whether each token must be known before the next is sent for."""
        return self.request.grammar is not None
