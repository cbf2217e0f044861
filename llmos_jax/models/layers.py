"""The parts of a decoder block that are not attention: norm, gated feed-forward,
embedding, head.

B sequences, T tokens, D model, F feed-forward, V vocabulary. Every parameter is born
with its logical axes; parameters are float32 and compute follows the dtype they are
cast to.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.models.annotate import annotate
from llmos_jax.models.draw import normal
from llmos_jax.models.lookup import lookup, lookup_scaled
from llmos_jax.models.lora import factors_for
from llmos_jax.models.project import project
from llmos_jax.models.weight import (
    Held,
    matrix,
    per_token_scales,
    quantized_product,
)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv 1910.07467); over the last dimension, of
    tokens or of their heads."""

    def __init__(
        self, dim: int, epsilon: float, *, offset: bool = False, axis: str = "norm"
    ):
        """Begin as no more than a norm.

        Args:
            dim: size of the last dimension.
            epsilon: added to the mean square.
            offset: multiply by 1 + scale (Gemma), and let the scale begin at 0.
            axis: the logical axis of `dim`.
        """
        fresh = jnp.zeros if offset else jnp.ones
        self.scale = nnx.Param(fresh((dim,), jnp.float32), out_sharding=(axis,))
        self.epsilon, self.offset = epsilon, offset

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the normed [B, T, ..., dim], in its dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        scale = self.scale[...].astype(jnp.float32) + jnp.float32(self.offset)
        scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
        y = x32 * jax.lax.rsqrt(mean_square + self.epsilon) * scale
        return y.astype(x.dtype)


@jax.custom_vjp
def swiglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """silu(gate) * up, keeping for the backward pass its two inputs and no more."""
    return gate_BTF * jax.nn.sigmoid(gate_BTF) * up_BTF


def _swiglu_forward(
    gate_BTF: jax.Array, up_BTF: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return swiglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _swiglu_backward(
    saved: tuple[jax.Array, jax.Array], dh_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    # The barrier keeps XLA from finding the forward pass's sigmoid and saving it, too.
    gate_BTF, up_BTF = jax.lax.optimization_barrier(saved)
    s_BTF = jax.nn.sigmoid(gate_BTF)
    dgate_BTF = dh_BTF * up_BTF * s_BTF * (1 + gate_BTF * (1 - s_BTF))
    return dgate_BTF, dh_BTF * gate_BTF * s_BTF


swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@jax.custom_vjp
def geglu(gate_BTF: jax.Array, up_BTF: jax.Array) -> jax.Array:
    """gelu(gate) * up, with gelu's tanh form (arXiv 1606.08415), keeping its inputs."""
    return jax.nn.gelu(gate_BTF, approximate=True) * up_BTF


def _geglu_forward(
    gate_BTF: jax.Array, up_BTF: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return geglu(gate_BTF, up_BTF), (gate_BTF, up_BTF)


def _geglu_backward(
    saved: tuple[jax.Array, jax.Array], dh_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    gate_BTF, up_BTF = jax.lax.optimization_barrier(saved)
    gelu_BTF, pull = jax.vjp(lambda x: jax.nn.gelu(x, approximate=True), gate_BTF)
    (dgate_BTF,) = pull(dh_BTF * up_BTF)
    return dgate_BTF, dh_BTF * gelu_BTF


geglu.defvjp(_geglu_forward, _geglu_backward)

GATED: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "silu": swiglu,
    "gelu_tanh": geglu,
}
"""ModelSpec.activation -> (gate, up) -> what goes into `down`."""


class FeedForward(nnx.Module):
    """down(activation(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        D, F = spec.embed_dim, spec.ffn_dim
        down_scale = (2 * spec.num_layers * F) ** -0.5
        into, out = {"embed": D}, {"ffn": F}
        self.gate = matrix(spec, rngs, into, out, D**-0.5)
        self.up = matrix(spec, rngs, into, out, D**-0.5)
        self.down = matrix(spec, rngs, out, into, down_scale)
        self.gate_lora = factors_for(spec, "gate", into, out, rngs=rngs)
        self.up_lora = factors_for(spec, "up", into, out, rngs=rngs)
        self.down_lora = factors_for(spec, "down", out, into, rngs=rngs)
        self.activation = spec.activation

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = project(
            x_BTD, self.gate[...], name="ffn_gate", beside=self.gate_lora
        )
        up_BTF = project(x_BTD, self.up[...], name="ffn_up", beside=self.up_lora)
        h_BTF = GATED[self.activation](gate_BTF, up_BTF)
        h_BTF = annotate(h_BTF, "batch", "seq", "ffn")
        return project(h_BTF, self.down[...], name="ffn_out", beside=self.down_lora)


def capped(x: jax.Array, cap: float | None) -> jax.Array:
    """cap tanh(x / cap): scores or logits that stay below `cap` (Gemma 2, arXiv
    2408.00118, section 2); None leaves them."""
    return x if cap is None else jnp.tanh(x / cap) * cap


class Embedding(nnx.Module):
    """Token table; also the output head where embeddings are tied."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        V, D = spec.vocab_size, spec.embed_dim
        how = spec.quantization
        self.table = (
            normal(rngs, (V, D), 0.02, ("vocab", "embed"))
            if how is None or how.embedding == "none"
            else per_token_scales(how, is_table=True, D=D, V=V)
        )
        self.scale = D**0.5 if spec.scaled_embeddings else None

    def __call__(self, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Return [B, T, D]; in `dtype` if the table is in few bits, else in its own."""
        table = self.table[...]
        if isinstance(table, Held):
            x_BTD = lookup_scaled(table.values, table.scale, tokens_BT, dtype)
        else:
            x_BTD = lookup(table, tokens_BT)
        if self.scale is None:
            return x_BTD
        # Rounded to the dtype of activations first, as the model was trained with.
        return x_BTD * jnp.asarray(self.scale, x_BTD.dtype)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V] against the table."""
        table = self.table[...]
        if isinstance(table, Held):
            return quantized_product(x_BTD, table, transposed=True, dtype=jnp.float32)
        return jnp.einsum(
            "BTD,VD->BTV", x_BTD, table, preferred_element_type=jnp.float32
        )


class Head(nnx.Module):
    """Output projection of an untied model."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        D, V, how = spec.embed_dim, spec.vocab_size, spec.quantization
        self.kernel = (
            normal(rngs, (D, V), D**-0.5, ("embed", "vocab"))
            if how is None or how.head == "none"
            else per_token_scales(how, is_table=False, D=D, V=V)
        )

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V]."""
        kernel = self.kernel[...]
        if isinstance(kernel, Held):
            return quantized_product(x_BTD, kernel, dtype=jnp.float32)
        return jnp.einsum(
            "BTD,DV->BTV", x_BTD, kernel, preferred_element_type=jnp.float32
        )
