"""Pages of the KV cache: who holds which, and what prompts that begin alike share.

A page holds the keys and values of C consecutive tokens. A full page is known by its
digest: of its tokens and of the digest of the page before, so equal digests mean equal
beginnings. Pages that nobody holds keep what is in them until their room is wanted;
the one that was let go first goes first, and of one sequence the last of its pages.

Always: held + cached + free = all.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np

Digest = bytes
_DIGEST_BYTES = 16
"""BLAKE2b of 128 bits: that two of n pages collide has a chance of n^2 / 2^129."""
ROOT: Digest = b""


def digest_of(parent: Digest, tokens: Sequence[int]) -> Digest:
    """Of a full page after the page `parent`, or ROOT."""
    words = np.asarray(tokens, np.int32).tobytes()
    return hashlib.blake2b(parent + words, digest_size=_DIGEST_BYTES).digest()


def digests_of(tokens: Sequence[int], page_size: int) -> Iterator[Digest]:
    """Of all full pages of a sequence, in order."""
    digest = ROOT
    for end in range(page_size, len(tokens) + 1, page_size):
        digest = digest_of(digest, tokens[end - page_size : end])
        yield digest


class Pages:
    """All pages of a cache, by number."""

    def __init__(self, count: int):
        """Begin with `count` free pages."""
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._digest: dict[int, Digest] = {}
        self._known: dict[Digest, int] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and those that are only remembered."""
        return len(self._free) + len(self._cached)

    @property
    def cached(self) -> int:
        """Pages that nobody holds and that a prompt may find."""
        return len(self._cached)

    @property
    def held(self) -> int:
        """Pages that somebody holds."""
        return self.count - self.available

    def take(self, count: int) -> list[int] | None:
        """Hold `count` pages, or None if there are not as many."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._cached.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, digests: Sequence[Digest]) -> list[int]:
        """Hold the pages of the longest beginning that is known."""
        found = []
        for digest in digests:
            page = self._known.get(digest)
            if page is None:
                break
            if self._holders[page] == 0:
                del self._cached[page]
            self._holders[page] += 1
            found.append(page)
        return found

    def remember(self, page: int, digest: Digest) -> None:
        """Let a page that is held, and full, be found from now on.

        The first page of a digest is the one that is found.
        """
        assert self._holders[page] > 0, f"page {page} is held by nobody"
        if digest not in self._known and page not in self._digest:
            self._known[digest], self._digest[page] = page, digest

    def let_go(self, pages: Sequence[int], *, forget: bool = False) -> None:
        """Hold them no more; with `forget`, let nobody find them."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} was let go twice"
            if forget:
                self._forget(page)
            self._holders[page] -= 1
            if self._holders[page] > 0:
                continue
            if page in self._digest:
                self._cached[page] = None
            else:
                self._free.append(page)

    def _forget(self, page: int) -> None:
        digest = self._digest.pop(page, None)
        if digest is not None:
            del self._known[digest]

    def holders(self) -> dict[int, int]:
        """How many hold each page that is held."""
        return {page: count for page, count in enumerate(self._holders) if count}

    def check(self) -> None:
        """Assert what always holds."""
        free, cached = set(self._free), set(self._cached)
        held = {page for page, count in enumerate(self._holders) if count > 0}
        assert len(free) == len(self._free), "a page is free twice"
        assert free.isdisjoint(cached) and free.isdisjoint(held), "free, and not"
        assert cached.isdisjoint(held), "cached, and held"
        assert free | cached | held == set(range(self.count)), "a page is lost"
        assert cached <= self._digest.keys(), "cached without a digest"
        assert free.isdisjoint(self._digest), "free with a digest"
        assert {page: digest for digest, page in self._known.items()} == self._digest
