"""Attention of new tokens over a cache of keys and values, and writing that cache."""

from llmos_jax.kernels.decode_attention.api import (
    IMPLEMENTATIONS,
    WRITERS,
    decode_attention,
    write_tokens,
)

__all__ = ["IMPLEMENTATIONS", "WRITERS", "decode_attention", "write_tokens"]
