"""A model may be given as a table, a spec or a name; all three are the same plan."""

import jax.numpy as jnp
import pytest
from flax import nnx
from llama_table import spec_of, table_of

from llmos_jax.ir import Workload
from llmos_jax.models import param_table
from llmos_jax.planner import plan


@pytest.mark.parametrize("name", ["tiny", "llama3_8b"])
def test_hand_written_table_is_the_model(name):
    assert table_of(name) == param_table(spec_of(name))


@pytest.mark.parametrize("model", ["tiny", spec_of("tiny")], ids=["name", "spec"])
def test_every_form_of_a_model_gives_the_same_plan(model):
    work = Workload(global_batch=8, seq_len=64)
    by_table = plan(table_of("tiny"), "cpu:8", work, "llama")
    assert plan(model, "cpu:8", work, "llama").fingerprint == by_table.fingerprint


def test_flax_module_of_ones_own_is_planned():
    class Mlp(nnx.Module):
        def __init__(self):
            shape, axes = (64, 256), ("embed", "ffn")
            self.up = nnx.Param(jnp.zeros(shape), out_sharding=axes)

    found = plan(Mlp, "v5e:2x2", Workload(global_batch=8, seq_len=16), "llama")
    assert len(found.partition_spec("up")) == 2
