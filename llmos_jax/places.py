"""Say where things lie: packaged data folders, and the cache of this user.

`configs/` and `sharding_rules/` stand beside the package in a checkout and inside it
(`_data/`) in a wheel. Only config/load.py and rules/load.py open what is found there.
"""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """Return `configs` or `sharding_rules`: the checkout's, else the packaged one."""
    beside = _PACKAGE.parent / name
    if beside.is_dir() and (_PACKAGE.parent / "pyproject.toml").is_file():
        return beside
    return _PACKAGE / "_data" / name


def cache_folder() -> Path:
    """Return this user's cache: $LLMOS_CACHE or ~/.cache/llmos_jax. Maybe absent."""
    chosen = os.environ.get("LLMOS_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "llmos_jax"
