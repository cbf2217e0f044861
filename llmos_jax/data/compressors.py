"""Turn text into the figures to beat: how well gzip and xz compress it.

The same bytes that a model is judged on, compressed as `gzip -9` and `xz -9` do.
"""

from __future__ import annotations

import gzip
import lzma

from llmos_jax.errors import DataError


def compare(raw: bytes) -> dict[str, float]:
    """Return {"gzip_bits_per_byte", "xz_bits_per_byte"} of one run of bytes."""
    if not raw:
        raise DataError("there is no text to compress.")
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw),
        "xz_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
