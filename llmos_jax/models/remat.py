"""Wrap a layer so that its backward pass finds what the plan wants saved.

Tensors are known by the names in ir/plan.py (TENSORS), which the layer gives them with
`checkpoint_name`; a policy is a set of them. What is not saved is computed again; what
is offloaded waits in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llmos_jax.ir import saved_tensors


def rematerialised(
    body: Callable[..., Any], remat: str, offload: tuple[str, ...] = ()
) -> Callable[..., Any]:
    """Return `body`, whose backward pass keeps only what `remat` names.

    Args:
        body: one layer.
        remat: a name in REMATS, or tensors' names joined by commas.
        offload: those of the saved that go to host memory and come back.

    Raises:
        ConfigError: a policy or a tensor that is not known.
    """
    if remat == "none" and not offload:
        return body
    saved = saved_tensors(remat)
    if offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=sorted(saved - set(offload)),
            names_which_can_be_offloaded=sorted(offload),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        # A saved input is what the loop carries; naming it would copy it.
        named = sorted(saved - {"layer_input"})
        policy = jax.checkpoint_policies.save_only_these_names(*named)
    return jax.checkpoint(body, policy=policy, prevent_cse=False)
