"""Split the name of an object or a folder in a store: scheme, bucket, key."""

from __future__ import annotations

import re
from dataclasses import dataclass

from llmos_jax.errors import StoreError

SCHEMES = ("s3", "gs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where an object (or every object below a key) lies.

    Attributes:
        scheme: `s3` or `gs`.
        bucket: its bucket.
        key: the rest, without a leading slash; "" is the whole bucket.
    """

    scheme: str
    bucket: str
    key: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}"

    def at(self, key: str) -> Address:
        """Return the address of another key of the same bucket."""
        return Address(scheme=self.scheme, bucket=self.bucket, key=key)

    @staticmethod
    def parse(url: str) -> Address:
        """Split `s3://bucket/key`.

        Raises:
            StoreError: it is no such name.
        """
        scheme, separator, rest = url.partition("://")
        bucket, _, key = rest.partition("/")
        if not separator or scheme not in SCHEMES:
            raise StoreError(
                f"{url!r} names no object store. Wanted s3://bucket/key or "
                "gs://bucket/key."
            )
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket):
            raise StoreError(
                f"{url!r} names no bucket that could be: {bucket!r}. Wanted "
                f"{scheme}://bucket/key."
            )
        if "//" in key or any(part in (".", "..") for part in key.split("/")):
            raise StoreError(
                f"{url!r} has an empty, '.' or '..' step in its path, which no file "
                "could have. Copy the object to another key."
            )
        return Address(scheme=scheme, bucket=bucket, key=key)


def is_remote(name: str) -> bool:
    """Whether `name` names an object store, not a local file."""
    return name.partition("://")[0] in SCHEMES and "://" in name


def join(url: str, *parts: str) -> str:
    """Return the URL of something below `url`."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])
