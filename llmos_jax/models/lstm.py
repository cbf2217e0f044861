"""A classifier of texts: embeddings, bidirectional LSTM layers, pooling, a linear head.
What is pooled is a token's states beside its embedding (RCNN: Lai et al. 2015, AAAI).

B sequences, T tokens, D model, F state of a direction, R directions, G gates. Both
directions run in one scan, as a batch of two products: the loop is what costs, not the
numbers in it. The backward direction reads each text from its own last token.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from llmos_jax.ir import ModelSpec
from llmos_jax.models.annotate import annotate
from llmos_jax.models.classes import ClassHead, Noise, counts, dropped, words_dropped
from llmos_jax.models.draw import normal
from llmos_jax.models.layers import Embedding
from llmos_jax.models.project import project

GATES = 4
"""Input, forget, cell, output, in this order."""


class BidirectionalLstm(nnx.Module):
    """Both directions of one layer (Hochreiter & Schmidhuber 1997, with the forget gate
    of Gers et al. 2000, whose bias begins at 1: Jozefowicz et al. 2015)."""

    def __init__(self, width: int, state: int, axis: str, *, rngs: nnx.Rngs):
        """Draw the weights.

        Args:
            width: of what goes in.
            state: F.
            axis: logical axis of `width`.
            rngs: to draw from.
        """
        self.into = normal(
            *(rngs, (width, 2, GATES, state), width**-0.5),
            (axis, "directions", "gates", "ffn"),
        )
        self.recurrent = normal(
            *(rngs, (2, state, GATES, state), state**-0.5),
            ("directions", "hidden", "gates", "ffn"),
        )
        forget = jnp.zeros((2, GATES, state), jnp.float32).at[:, 1].set(1.0)
        self.gate_bias = nnx.Param(forget, out_sharding=("directions", "gates", "ffn"))

    def __call__(self, x_BTD: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """Return [B, T, 2 F]: of each token, what both directions know of it."""
        T = x_BTD.shape[1]
        gates_BTRGF = project(x_BTD, self.into[...], name="gates")
        gates_BTRGF = gates_BTRGF + self.gate_bias[...][None, None]
        back_BT = _reversed(T, lengths_B)
        both = [gates_BTRGF[:, :, 0], _taken(gates_BTRGF[:, :, 1], back_BT)]
        inputs_TRBGF = jnp.stack([jnp.moveaxis(one, 1, 0) for one in both], axis=1)
        is_text_TB = counts(T, lengths_B).T
        state_TRBF = recur(inputs_TRBGF, self.recurrent[...], is_text_TB)
        state_RBTF = jnp.moveaxis(state_TRBF, 0, 2)
        both = [state_RBTF[0], _taken(state_RBTF[1], back_BT)]
        return annotate(jnp.concatenate(both, axis=-1), "batch", "seq", "hidden")


_AXES = ("directions", "batch", "gates", "ffn")


@jax.custom_vjp
def recur(
    inputs_TRBGF: jax.Array, recurrent_RFGF: jax.Array, is_text_TB: jax.Array
) -> jax.Array:
    """Run the cells of R directions side by side; return their states [T, R, B, F].

    Where there is no text the state stays. The gradient of the recurrent weights is
    one product over all tokens, after the loop back, not a sum made in it.

    Args:
        inputs_TRBGF: what a token brings to each gate, biases among it.
        recurrent_RFGF: from the state before to each gate.
        is_text_TB: bool.
    """
    return _run(inputs_TRBGF, recurrent_RFGF, is_text_TB)[0]


def _run(
    inputs_TRBGF: jax.Array, recurrent_RFGF: jax.Array, is_text_TB: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States and cells [T, R, B, F], gates [T, R, B, G, F]."""
    _, R, B, _, F = inputs_TRBGF.shape
    zero = jnp.zeros((R, B, F), inputs_TRBGF.dtype)

    def step(
        carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]:
        (h, c), (input_RBGF, is_text_B) = carry, now
        h_whole = annotate(h, "directions", "batch", "hidden")
        gates = input_RBGF + jnp.einsum("RBF,RFGH->RBGH", h_whole, recurrent_RFGF)
        gates = annotate(gates, *_AXES)
        fresh_h, fresh_c = _cell(gates, c)
        stays = _like(is_text_B, h)
        h, c = jnp.where(stays, fresh_h, h), jnp.where(stays, fresh_c, c)
        return (h, c), (h, c, gates)

    _, seen = jax.lax.scan(step, (zero, zero), (inputs_TRBGF, is_text_TB))
    return seen


def _cell(gates_RBGF: jax.Array, c: jax.Array) -> tuple[jax.Array, jax.Array]:
    i, f, g, o = (gates_RBGF[:, :, index] for index in range(GATES))
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _like(is_text_B: jax.Array, h_RBF: jax.Array) -> jax.Array:
    return jnp.broadcast_to(is_text_B[None, :, None], h_RBF.shape)


def _forward(
    inputs_TRBGF: jax.Array, recurrent_RFGF: jax.Array, is_text_TB: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    seen = _run(inputs_TRBGF, recurrent_RFGF, is_text_TB)
    return seen[0], (*seen, recurrent_RFGF, is_text_TB)


def _backward(
    saved: tuple[jax.Array, ...], dstate_TRBF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    h_TRBF, c_TRBF, gates_TRBGF, recurrent_RFGF, is_text_TB = saved
    zero = jnp.zeros_like(h_TRBF[0])

    def before(x_TRBF: jax.Array) -> jax.Array:
        return jnp.concatenate([zero[None], x_TRBF[:-1]])

    def step(
        carry: tuple[jax.Array, jax.Array], now: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        (dh, dc), (gates, c_before, is_text_B, dstate) = carry, now
        dh = dh + dstate
        stays = _like(is_text_B, dh)
        _, pull = jax.vjp(_cell, gates, c_before)
        made = (jnp.where(stays, dh, zero), jnp.where(stays, dc, zero))
        dgates, dc_before = pull(made)
        dh_before = jnp.einsum("RBGH,RFGH->RBF", dgates, recurrent_RFGF)
        dh = dh_before + jnp.where(stays, zero, dh)
        return (dh, dc_before + jnp.where(stays, zero, dc)), dgates

    _, dgates_TRBGF = jax.lax.scan(
        step,
        (zero, zero),
        (gates_TRBGF, before(c_TRBF), is_text_TB, dstate_TRBF),
        reverse=True,
    )
    drecurrent = jnp.einsum("TRBF,TRBGH->RFGH", before(h_TRBF), dgates_TRBGF)
    return dgates_TRBGF, drecurrent, None


recur.defvjp(_forward, _backward)


def _reversed(T: int, lengths_B: jax.Array) -> jax.Array:
    """int32 [B, T]: positions of a text from its end; padding stays where it is."""
    t_1T = jnp.arange(T, dtype=jnp.int32)[None, :]
    back_BT = lengths_B[:, None] - 1 - t_1T
    return jnp.where(back_BT >= 0, back_BT, jnp.broadcast_to(t_1T, back_BT.shape))


def _taken(x: jax.Array, at_BT: jax.Array) -> jax.Array:
    """[B, T, ...] in another order of tokens."""
    at = at_BT.reshape(*at_BT.shape, *(1,) * (x.ndim - 2))
    return jnp.take_along_axis(x, at, axis=1)


class LstmClassifier(nnx.Module):
    """Tokens in, logits of classes out."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        assert spec.classes is not None
        self.spec = spec
        self.embed = Embedding(spec, rngs=rngs)
        state = spec.ffn_dim
        for number in range(spec.num_layers):
            into = (spec.embed_dim, "embed") if number == 0 else (2 * state, "hidden")
            setattr(
                self,
                f"lstm_{number}",
                BidirectionalLstm(*into[:1], state, into[1], rngs=rngs),
            )
        width = 2 * state + spec.embed_dim
        self.classifier = ClassHead(spec.classes, width, "hidden", rngs=rngs)

    def class_logits(
        self, tokens_BT: jax.Array, lengths_B: jax.Array, noise: Noise | None = None
    ) -> jax.Array:
        """Return float32 [B, C].

        Args:
            tokens_BT: int32, padded on the right.
            lengths_B: int32, tokens of each text, at least 1.
            noise: in training.
        """
        dtype = self.classifier.kernel[...].dtype
        x_BTD = self.embed(tokens_BT, dtype)
        if noise is not None:
            x_BTD = dropped(words_dropped(x_BTD, noise.of(0)), noise.of(1))
        word_BTD = x_BTD = annotate(x_BTD, "batch", "seq", "embed")
        for number in range(self.spec.num_layers):
            x_BTD = getattr(self, f"lstm_{number}")(x_BTD, lengths_B)
            if number + 1 < self.spec.num_layers and noise is not None:
                x_BTD = dropped(x_BTD, noise.of(number + 2))
        x_BTD = jnp.concatenate([x_BTD, word_BTD], axis=-1)
        return self.classifier(x_BTD, lengths_B, noise)
