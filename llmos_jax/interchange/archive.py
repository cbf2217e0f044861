"""A model as somebody else stores it, seen through Hugging Face's names.

Whatever the file, an archive answers with the `config.json` and the tensors that a
Hugging Face folder of the same model has. So a family needs one weight map, and what is
special to a format (GGUF's permuted rotations, its norms with 1 added) stays with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from llmos_jax.data import Tokenizer
from llmos_jax.models import Params, Skeleton


class TensorFacts(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """Of what `read` gives: float32, float16 or bfloat16."""
    stored_bytes: int
    """In the file, where it may be packed."""


class Archive(Protocol):
    """Somebody else's model; nothing is read but what is asked for."""

    @property
    def path(self) -> Path:
        """The folder or file."""

    @property
    def config(self) -> dict[str, Any]:
        """As in `config.json`."""

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """By Hugging Face's name."""

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return a tensor, or some of its first dimension, in memory of its own; safe
        to call from several threads.

        Raises:
            CheckpointError: the file ends early, or what it holds is no such tensor.
        """

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer that goes with the weights.

        Raises:
            CheckpointError: there is none, or none that can be read.
        """


class OpenedModel(Protocol):
    """A model with weights, whoever stored them."""

    @property
    def skeleton(self) -> Skeleton:
        """What it is."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What its tokens mean."""

    @property
    def step(self) -> int:
        """Training step of a checkpoint; 0 of what others made."""

    @property
    def config_path(self) -> Path | None:
        """The config of the run it belongs to, if there is one."""

    def params(
        self, shardings: dict[str, Any] | None = None, *, dtype: str | None = None
    ) -> Params:
        """Read parameters onto shardings, or onto the first device; those named in
        `shardings` alone. `dtype` None keeps what is stored."""
