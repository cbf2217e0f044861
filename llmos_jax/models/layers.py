"""The parts of a decoder block that are not attention: norm, SwiGLU, embedding, head.

B sequences, T tokens, D model, F feed-forward, V vocabulary. Every parameter is born
with its logical axes; parameters are float32 and compute follows the dtype they are
cast to.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.models.annotate import annotate
from llmos_jax.models.lookup import lookup
from llmos_jax.models.project import project


def normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], scale: float, axes: tuple[str, ...]
) -> nnx.Param:
    """A float32 parameter drawn from N(0, scale**2), truncated at 2 sigma."""
    value = jax.random.truncated_normal(rngs.params(), -2.0, 2.0, shape, jnp.float32)
    return nnx.Param(value * jnp.float32(scale), out_sharding=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32), out_sharding=("norm",))
        self.epsilon = epsilon

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x32_BTD = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
        scale_BTD = self.scale[...].astype(jnp.float32)[None, None, :]
        y_BTD = x32_BTD * jax.lax.rsqrt(mean_square + self.epsilon) * scale_BTD
        return y_BTD.astype(x_BTD.dtype)


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


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, D: int, F: int, *, num_layers: int, rngs: nnx.Rngs):
        self.gate = normal(rngs, (D, F), D**-0.5, ("embed", "ffn"))
        self.up = normal(rngs, (D, F), D**-0.5, ("embed", "ffn"))
        self.down = normal(rngs, (F, D), (2 * num_layers * F) ** -0.5, ("ffn", "embed"))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF = project(x_BTD, self.gate[...], name="ffn_gate")
        up_BTF = project(x_BTD, self.up[...], name="ffn_up")
        h_BTF = annotate(swiglu(gate_BTF, up_BTF), "batch", "seq", "ffn")
        return project(h_BTF, self.down[...], name="ffn_out")


class Embedding(nnx.Module):
    """Token table; also the output head where embeddings are tied."""

    def __init__(self, V: int, D: int, *, rngs: nnx.Rngs):
        self.table = normal(rngs, (V, D), 0.02, ("vocab", "embed"))

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        return lookup(self.table[...], tokens_BT)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V] against the table."""
        return jnp.einsum(
            "BTD,VD->BTV", x_BTD, self.table[...], preferred_element_type=jnp.float32
        )


class Head(nnx.Module):
    """Output projection of an untied model."""

    def __init__(self, D: int, V: int, *, rngs: nnx.Rngs):
        self.kernel = normal(rngs, (D, V), D**-0.5, ("embed", "vocab"))

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Return float32 logits [B, T, V]."""
        return jnp.einsum(
            "BTD,DV->BTV", x_BTD, self.kernel[...], preferred_element_type=jnp.float32
        )
