"""Who may ask: API keys as bearer tokens."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from llmos_jax.server.refusals import Refusal

OPEN_PATHS = frozenset(
    {"/", "/health", "/ready", "/metrics", "/state", "/openapi.json"}
)
"""What tells how the server is, and not what it was asked."""


class Keys:
    """The keys that open the door; only their hashes are kept."""

    def __init__(self, keys: Sequence[str]):
        self._hashes = [_hash(key.encode()) for key in keys]

    def tenant_of(self, authorization: str | None) -> str:
        """Return who a header names, or "" where there are no keys.

        Every key is compared, in equal time, whichever fits.

        Raises:
            Refusal: 401, no key or a wrong one.
        """
        if not self._hashes:
            return ""
        scheme, _, key = (authorization or "").partition(" ")
        given = _hash(key.strip().encode("utf-8", "surrogateescape"))
        fits = [hmac.compare_digest(given, one) for one in self._hashes]
        if scheme.lower() != "bearer" or not any(fits):
            what = "wrong" if authorization else "missing"
            raise Refusal(
                401,
                f"the API key is {what}. Send one that the server was started with, "
                "as `Authorization: Bearer KEY`.",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return given.hex()[:12]


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
