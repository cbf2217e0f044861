"""Classifiers small enough for a test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax import checkpoint, lowering, serving
from llmos_jax.config.schema import ServeSection
from llmos_jax.data import bytes_tokenizer
from llmos_jax.ir import Classes, ModelSpec
from llmos_jax.models import Params, Skeleton, skeleton
from llmos_jax.scheduling import Request
from llmos_jax.serving import Engine, Options

LABELS = ("question", "order", "greeting", "other")
CONTEXT = 40
VOCAB = 264
"""Of data.bytes_tokenizer, rounded up to what eight devices divide."""


@cache
def classifier_of(family: str = "lstm_classifier") -> tuple[Skeleton, Params]:
    """A model of random weights, large enough that no two texts look alike to it."""
    spec = ModelSpec(
        name="small_classifier",
        family=family,
        num_layers=1,
        embed_dim=16,
        ffn_dim=16,
        num_heads=8,
        num_kv_heads=8,
        head_dim=8,
        vocab_size=VOCAB,
        max_seq_len=64,
        classes=Classes(labels=LABELS, pooling="mean"),
    ).check()
    found = skeleton(spec)
    return found, jax.jit(found.init)(jax.random.key(3))


def write_classifier(folder: Path, family: str = "lstm_classifier") -> Path:
    """A checkpoint of such a model, with a tokenizer of bytes."""
    found, params = classifier_of(family)
    checkpoint.save_model(str(folder), found, params, bytes_tokenizer(), {"test": "1"})
    return folder


def logits_of(text: Sequence[int], family: str = "lstm_classifier") -> np.ndarray:
    """Of one text by itself, without padding."""
    tokens = jnp.asarray([text], jnp.int32)
    return np.asarray(_alone(family)(classifier_of(family)[1], tokens))[0]


@cache
def _alone(family: str) -> Any:
    def logits(params: Params, tokens_1T: jax.Array) -> jax.Array:
        length = jnp.full((1,), tokens_1T.shape[1], jnp.int32)
        made: jax.Array = (
            classifier_of(family)[0].bind(params).class_logits(tokens_1T, length)
        )
        return made

    return jax.jit(logits)


@contextmanager
def classifying(
    family: str = "lstm_classifier", options: Options | None = None, **sizes: Any
) -> Iterator[Engine]:
    """An engine on one device that is ready."""
    lowering.keep_compiled_programs()
    asked = ServeSection(**({"seats": 4, "context": CONTEXT} | sizes))
    engine = serving.open_classifier(
        *classifier_of(family), asked, options or Options()
    )
    try:
        engine.wait_until_ready()
        assert engine.state().stage == "ready", engine.state().problem
        yield engine
        engine._scheduler.check()
        assert engine.state().unplanned_compiles == 0
    finally:
        engine.stop()


def text_of(name: object, tokens: Any, **rest: Any) -> Request:
    """A text to be classified."""
    return Request(
        id=str(name),
        prompt=np.asarray(tokens, np.int32),
        max_tokens=0,
        wants="classes",
        **rest,
    )
