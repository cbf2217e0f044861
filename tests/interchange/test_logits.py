"""Our models compute what transformers' do: logits of tiny random checkpoints."""

from __future__ import annotations

import hf_models
import jax.numpy as jnp
import numpy as np
import pytest

from llmos_jax.interchange import open_archive

ABSOLUTE = 1e-4
"""Float32 logits of order 1 to 10 after four layers, sums in another order."""
B, T = 2, 40  # five windows long


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["grouped", "multi-query"])
@pytest.mark.parametrize("architecture", list(hf_models.FAMILIES))
def test_logits_are_those_of_transformers(architecture, kv_heads, tmp_path):
    made = hf_models.model(architecture, kv_heads)
    opened = open_archive(hf_models.save(made, tmp_path / "m"))
    tokens_BT = np.random.default_rng(0).integers(0, 96, (B, T))
    with hf_models.torch.no_grad():
        wanted_BTV = made(hf_models.torch.tensor(tokens_BT)).logits.numpy()
    decoder = opened.skeleton.bind(opened.params())
    got_BTV = np.asarray(decoder(jnp.asarray(tokens_BT, jnp.int32)))
    assert np.abs(wanted_BTV).max() > 0.5
    assert np.abs(got_BTV - wanted_BTV).max() < ABSOLUTE
