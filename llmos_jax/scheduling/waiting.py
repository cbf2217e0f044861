"""Who waits, and who is next: by priority, then fair shares of tokens, then order.

Tenants that wait get equal shares: of two with waiting requests of one priority the one
goes first that was given fewer tokens. Who comes back after a while does not bring
claims along: its account begins at the least of those that wait (start-time fair
queueing, Goyal et al., SIGCOMM 1996).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from llmos_jax.scheduling.sequence import Sequence


class Waiting:
    """Sequences without a seat."""

    def __init__(self) -> None:
        self._lines: dict[str, list[Sequence]] = defaultdict(list)
        self._given: dict[str, float] = {}
        self._count = 0  # of its own: other threads ask while lines come and go
        self.tokens = 0
        """Prompt tokens and longest answers of all who wait."""

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait; it stands in its tenant's line by priority and order."""
        tenant = sequence.request.tenant
        if tenant not in self._lines:
            floor = min((self._given[other] for other in self._lines), default=0.0)
            self._given[tenant] = max(self._given.get(tenant, 0.0), floor)
        line = self._lines[tenant]
        line.append(sequence)
        line.sort(key=_rank)
        self._count += 1
        self.tokens += _weight(sequence)

    def first(self) -> Sequence | None:
        """Who is next."""
        heads = [line[0] for line in self._lines.values()]
        return min(heads, key=self._turn, default=None)

    def in_turn(self) -> list[Sequence]:
        """All who wait, who is next first."""
        return sorted(self, key=self._turn)

    def _turn(self, head: Sequence) -> tuple[int, bool, float, int]:
        priority, order = _rank(head)
        # Who was preempted had its turn already.
        is_new = head.preemptions == 0
        return priority, is_new, self._given[head.request.tenant], order

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of its line."""
        tenant = sequence.request.tenant
        self._lines[tenant].remove(sequence)
        if not self._lines[tenant]:
            del self._lines[tenant]
        self._count -= 1
        self.tokens -= _weight(sequence)

    def charge(self, tenant: str, tokens: int) -> None:
        """Write tokens that a tenant was given on its account."""
        self._given[tenant] = self._given.get(tenant, 0.0) + tokens
        if len(self._given) > _MOST_ACCOUNTS:
            self._close_accounts()

    def _close_accounts(self) -> None:
        """Forget tenants that do not wait; they begin anew."""
        self._given = {
            tenant: given
            for tenant, given in self._given.items()
            if tenant in self._lines
        }


_MOST_ACCOUNTS = 10_000
"""A judgement: a megabyte."""


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.request.priority, sequence.order


def _weight(sequence: Sequence) -> int:
    return sequence.limit - sequence.sent
