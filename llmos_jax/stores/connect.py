"""Open the store of a bucket, with what the environment says of keys and endpoints.

S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION,
AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE, the profile AWS_PROFILE of ~/.aws/credentials, and
the roles of a cloud machine. Google: GOOGLE_APPLICATION_CREDENTIALS, the machine's
account, or STORAGE_EMULATOR_HOST. Plain http is used for loopback endpoints, and where
AWS_ALLOW_HTTP=true says so.
"""

from __future__ import annotations

import configparser
import functools
import ipaddress
import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from obstore.store import GCSStore, S3Store

from llmos_jax.errors import StoreError
from llmos_jax.stores.address import Address
from llmos_jax.stores.patience import patience_s

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

Store = S3Store | GCSStore

# Judgements. A connection is made within a round trip or two, or not at all; a body
# that brings no byte for 20 s has stalled. The limit of one whole request must let a
# range or a part of 16 MiB through a line of 1 Mbit/s.
CONNECT_TIMEOUT = timedelta(seconds=5)
READ_TIMEOUT = timedelta(seconds=20)
REQUEST_TIMEOUT = timedelta(seconds=180)

# The retries of one request, inside the library; patience.py retries what these leave.
REQUEST_RETRIES = 4

# The process that opened the first store, by the name `first`.
_users: dict[str, int] = {}

_ROLES = (
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_SKIP_SIGNATURE",
)


def connect(address: Address) -> Store:
    """Return the (kept) client of a bucket.

    Raises:
        StoreError: the environment describes no usable endpoint, or this process was
            forked from one that used a store: the library's threads are not in it, and
            it would wait for them for ever.
    """
    if _users.setdefault("first", os.getpid()) != os.getpid():
        raise StoreError(
            f"{address.url}: a forked process cannot use the object stores that its "
            "parent has used. Start it with multiprocessing's spawn or forkserver."
        )
    environment = tuple(
        sorted(
            item
            for item in os.environ.items()
            if item[0].startswith(("AWS_", "GOOGLE_", "STORAGE_EMULATOR"))
        )
    )
    return _open(address.scheme, address.bucket, environment, patience_s())


def endpoint(address: Address) -> str:
    """Return the name of the server that holds a bucket, for messages."""
    if address.scheme == "gs":
        return os.environ.get("STORAGE_EMULATOR_HOST") or "storage.googleapis.com"
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"):
        if found := os.environ.get(name):
            return found
    return "Amazon S3"


@functools.lru_cache(maxsize=64)
def _open(
    scheme: str, bucket: str, environment: tuple[tuple[str, str], ...], patience: float
) -> Store:
    address = Address(scheme=scheme, bucket=bucket, key="")
    url = endpoint(address)
    plain = url.startswith("http://")
    allowed = (
        _is_loopback(url) or os.environ.get("AWS_ALLOW_HTTP", "").lower() == "true"
    )
    if plain and not allowed:
        raise StoreError(
            f"the endpoint {url} of {scheme}://{bucket} speaks plain http, which shows "
            "keys and data to the network. Use https, or set AWS_ALLOW_HTTP=true."
        )
    client: ClientConfig = {
        "allow_http": plain,
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "timeout": REQUEST_TIMEOUT,
    }
    retry: RetryConfig = {
        "max_retries": REQUEST_RETRIES,
        "retry_timeout": timedelta(seconds=patience / 2),
        "backoff": {
            "init_backoff": timedelta(milliseconds=100),
            "max_backoff": timedelta(seconds=min(5.0, patience / 4)),
            "base": 2,
        },
    }
    try:
        if scheme == "s3":
            return S3Store(
                bucket, config=_profile(), client_options=client, retry_config=retry
            )
        if "STORAGE_EMULATOR_HOST" in os.environ:
            where = url if "://" in url else f"http://{url}"
            client["allow_http"] = _is_loopback(where)
            return GCSStore(
                bucket,
                config={"base_url": where, "bearer_token": "none"},
                client_options=client,
                retry_config=retry,
            )
        return GCSStore(bucket, client_options=client, retry_config=retry)
    except StoreError:
        raise
    except Exception as problem:
        reason = str(problem).split("\n\nDebug source")[0].strip()
        raise StoreError(
            f"{scheme}://{bucket} cannot be opened: {reason}. Check the variables "
            "AWS_* or GOOGLE_* that describe it."
        ) from problem


def _profile() -> S3Config:
    """Return the keys of ~/.aws/credentials, unless the environment has its own."""
    if "AWS_ACCESS_KEY_ID" in os.environ or any(name in os.environ for name in _ROLES):
        return {}
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE") or "~/.aws/credentials"
    file = Path(path).expanduser()
    name = os.environ.get("AWS_PROFILE") or "default"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        if not parser.read(file, encoding="utf-8") or name not in parser:
            if "AWS_PROFILE" in os.environ:
                raise StoreError(
                    f"AWS_PROFILE names {name!r}, and {file} has no such profile. "
                    f"It has: {', '.join(parser.sections()) or 'none'}."
                )
            return {}
    except (configparser.Error, UnicodeDecodeError, OSError) as problem:
        raise StoreError(f"{file} cannot be read: {problem}.") from problem
    section = parser[name]
    keys: S3Config = {}
    if "aws_access_key_id" in section and "aws_secret_access_key" in section:
        keys["access_key_id"] = section["aws_access_key_id"]
        keys["secret_access_key"] = section["aws_secret_access_key"]
    if "aws_session_token" in section:
        keys["session_token"] = section["aws_session_token"]
    return keys


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
