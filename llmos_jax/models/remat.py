"""Name what a layer keeps for its backward pass; the plan picks a name.

| name | kept per layer | recomputed |
|---|---|---|
| none | everything the backward pass reads | nothing |
| dots | outputs of matmuls with weights | attention scores, norms, activations |
| full | the layer's input | the whole layer |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmos_jax.models.project import SAVED

REMAT_POLICIES = ("none", "dots", "full")


def rematerialised(body: Callable[..., Any], policy: str) -> Callable[..., Any]:
    """Wrap a layer function so that its backward pass keeps only what `policy` says."""
    if policy == "none":
        return body
    saveable = {
        "dots": jax.checkpoint_policies.save_only_these_names(SAVED),
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
    return jax.checkpoint(body, policy=saveable, prevent_cse=False)
