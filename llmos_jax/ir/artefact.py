"""Give every artefact the same four answers: JSON, from JSON, fingerprint, version.

An artefact is a frozen dataclass that a stage makes and another stage reads. Its JSON
is canonical (sorted keys), so equal artefacts have equal fingerprints on every machine.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, ClassVar, TypeVar

import msgspec

from llmos_jax.errors import ConfigError

A = TypeVar("A", bound="Artefact")


class Artefact:
    """Base of the nouns; subclasses are `@dataclass(frozen, slots, kw_only)`."""

    __slots__ = ()
    version: ClassVar[int] = 1

    def to_json(self) -> dict[str, Any]:
        """Return plain data (dicts, lists, numbers, text) with a `version` entry."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return {"version": self.version, **plain}

    @classmethod
    def from_json(cls: type[A], data: dict[str, Any]) -> A:
        """Rebuild an artefact; a foreign version or a wrong type is a ConfigError."""
        found = data.get("version", cls.version)
        if found != cls.version:
            raise ConfigError(
                f"{cls.__name__} of version {found} cannot be read; this release reads "
                f"version {cls.version}. Make it again with this release."
            )
        fields = {key: value for key, value in data.items() if key != "version"}
        try:
            return msgspec.convert(fields, cls)
        except msgspec.ValidationError as problem:
            raise ConfigError(f"{cls.__name__} cannot be read: {problem}") from None

    @property
    def fingerprint(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return fingerprint_of(self.to_json())


def fingerprint_of(plain: Any) -> str:
    """Fingerprint of plain data: 16 hex digits, stable across machines."""
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
