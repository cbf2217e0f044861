"""How a text is cut to be scored, and what is said meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llmos_jax.config import RunConfig

if TYPE_CHECKING:
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.training import Windows


def windows_of(opened: OpenedModel, config: RunConfig) -> Windows:
    """How a text is cut to be scored."""
    from llmos_jax import training

    tokenizer = opened.tokenizer
    return training.Windows(
        stride=config.evaluate.stride,
        begin_id=tokenizer.begin_id if tokenizer.marks.adds_bos else None,
        document_mask=config.data.is_masked,
    )


def tell(what: str, things: str = "layers") -> Callable[[int, int], None]:
    """Progress of long work, on stderr."""
    from llmos_jax import training
    from llmos_jax.telemetry import log

    return training.said_now_and_then(log, what, things=things)
