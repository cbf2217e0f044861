"""Keep routers balanced and their logits small: two losses beside that of the text.

L layers, E experts. Both are made of what each layer's router says of its batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from llmos_jax.models import Routing

ROUTER_METRICS = ("router_balance", "router_z", "expert_load")
"""What a step of a model with experts reports beside its loss."""


class RouterWeights(NamedTuple):
    """What each layer's router adds to the loss, per unit."""

    balance: float
    z: float


NO_ROUTER_LOSS = RouterWeights(balance=0.0, z=0.0)


def router_losses(
    routing: Routing, weights: RouterWeights
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return what is added to the loss, summed over layers, and figures to report.

    - Balance (Switch Transformer, arXiv 2101.03961, equation 4): E times the sum over
      experts of load times mean probability; 1 where all are alike. For k experts a
      token the load is the share of all assignments, so that k times this is Hugging
      Face's `load_balancing_loss_func` of one layer.
    - z (ST-MoE, arXiv 2202.08906, equation 5): the mean squared log-sum-exp of logits.

    Args:
        routing: with a leading L on every array.
        weights: of the two, for each layer.

    Returns:
        The loss to add; and, for ROUTER_METRICS, the means over layers of both losses,
        unweighted, and the load of the busiest expert of any layer over the mean load.
    """
    load_LE, probability_LE, square_L = routing
    E = load_LE.shape[1]
    balance_L = jnp.float32(E) * jnp.sum(load_LE * probability_LE, axis=1)
    added = jnp.float32(weights.balance) * jnp.sum(balance_L)
    added += jnp.float32(weights.z) * jnp.sum(square_L)
    figures = (jnp.mean(balance_L), jnp.mean(square_L), jnp.float32(E) * load_LE.max())
    return added, dict(zip(ROUTER_METRICS, figures, strict=True))
