"""How the server is set up."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmos_jax.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What the flags of `serve` say, and bounds that keep one client from the rest."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 takes any that is free."""
    api_keys: tuple[str, ...] = ()
    """Who may ask; none: everybody."""
    drain_s: float = 30.0
    """Seconds that accepted requests have to end when the server is told to stop."""
    tls_cert: Path | None = None
    tls_key: Path | None = None
    served_name: str | None = None
    """What the model is called; None: by its own name."""
    max_body_bytes: int = 16 << 20
    """A judgement: a million tokens of text have room."""
    max_unread_tokens: int = 1024
    """A stream whose client is so far behind, for each of its choices, is given up: a
    judgement."""
    stall_s: float = 60.0
    """Seconds that a client may take to send its body, or to read what was sent."""
    ping_s: float = 15.0
    """Seconds after which a silent stream sends a comment, so that proxies keep it."""

    def check(self) -> ServerOptions:
        """Return self, or raise ConfigError for what cannot be."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; it must be in [0, 65535].")
        if not 0 <= self.drain_s <= 86400:
            raise ConfigError(f"--drain-s is {self.drain_s}; it must be in [0, 86400].")
        for key in self.api_keys:
            if not key or not key.isascii() or any(one.isspace() for one in key):
                raise ConfigError(
                    "an API key is empty, or holds spaces or letters beyond ASCII, "
                    "which no header can carry. Choose another."
                )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError(
                "TLS needs a certificate and its key: give both --tls-cert and "
                "--tls-key."
            )
        return self
