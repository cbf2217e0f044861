"""Train a model as it will be stored: what `[qat]` asks for, checked.

The rounding is models/matrices.py's `as_stored`, which `compress` with
compress.method=nearest and compress.clip=false gives bit for bit.
"""

from __future__ import annotations

from dataclasses import replace

from llmos_jax.config.schema import QatSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec, Quantization


def quantization_of(asked: QatSection) -> Quantization | None:
    """What matrices are rounded to; None: they are not."""
    if asked.weights is None:
        return None
    return Quantization(
        weights=asked.weights,
        group=asked.group,
        embedding=asked.embedding,
        head=asked.head,
    )


def check_qat(spec: ModelSpec, asked: QatSection) -> Quantization | None:
    """The same, checked to go with a model.

    Raises:
        ConfigError: the model cannot be stored so, or its weights are not trained.
    """
    how = quantization_of(asked)
    if how is None:
        return None
    if spec.lora is not None:
        raise ConfigError(
            "qat.weights rounds the weights that are trained, and with [lora] they "
            "stay as they are. Train all weights, or merge the factors first: convert "
            "MODEL --to hf --out FOLDER."
        )
    if spec.classes is not None:
        raise ConfigError(
            f"qat.weights is for models that predict tokens, and {spec.name} is a "
            "classifier. Leave qat.weights out."
        )
    replace(spec, quantization=how).check()
    return how
