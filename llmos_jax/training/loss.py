"""Next-token cross-entropy.

B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def token_losses(logits_BTV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Return float32 -log p(target) [B, T], in nats."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    log_sum_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    chosen_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)
    return log_sum_BT - chosen_BT1[:, :, 0]
