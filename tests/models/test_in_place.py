"""A loop over layers leaves few-bit matrices whole for a TPU's kernel: the same
numbers, and no slice in what the TPU's compiler makes."""

from __future__ import annotations

import os
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from llmos_jax import planner
from llmos_jax.config import load_config, load_model
from llmos_jax.ir import ModelSpec, Pins, Plan, Quantization, Workload
from llmos_jax.kernels.target import Target
from llmos_jax.lowering import compile_devices, device_mesh
from llmos_jax.lowering.shardings import MeshSharder
from llmos_jax.models import Params, Skeleton, in_place, param_table, skeleton
from llmos_jax.models.annotate import annotated_by
from llmos_jax.rules import load_rules
from llmos_jax.serving import lower_decode_step

WAYS = {
    "int8": Quantization(),
    "W8A8": Quantization(activations="int8"),
    "int4": Quantization(weights="int4", group=32),
}
IN_PLACE = {"attention.o", "ffn.gate", "ffn.up", "ffn.down"}
"""q, k and v make heads and what each has: not one dimension in memory."""


@pytest.fixture
def for_tpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop is made as for a TPU, products as for what is here."""
    monkeypatch.setattr(in_place, "current_target", lambda: Target("tpu", 1))


def few_bits(how: Quantization | None, layers: int = 3) -> tuple[Skeleton, Params]:
    """A small model with random numbers."""
    spec = replace(load_model("tiny"), num_layers=layers, head_dim=64)
    found = skeleton(replace(spec, quantization=how).check())
    generator = np.random.default_rng(0)
    params = {}
    for row in reversed(found.table.rows):
        if row.path.endswith(".values"):
            numbers = generator.integers(0, 256, row.shape, np.uint8)
            params[row.path] = jnp.asarray(numbers).view(row.dtype)
        else:
            near_one = generator.uniform(0.9, 1.1, row.shape)
            owner, _, leaf = row.path.rpartition(".")
            is_small = leaf == "scale" and f"{owner}.values" in params
            size = 1e-3 if is_small else 1.0
            params[row.path] = jnp.asarray(size * near_one, row.dtype)
    return found, params


def plan_of(spec: ModelSpec, topology: str, **mesh: int) -> Plan:
    """A plan to decode eight sequences of 256 tokens."""
    return planner.plan(
        param_table(spec),
        topology,
        Workload(phase="decode", global_batch=8, seq_len=256),
        load_rules("llama", "decode"),
        Pins(mesh=mesh),
    )


def features(found: Skeleton, params: Params) -> jax.Array:
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(8, 3)
    return jax.jit(lambda params: found.bind(params).features(tokens)[0])(params)


def left_whole(found: Skeleton, params: Params) -> set[str]:
    whole, _ = in_place.left_whole(*found.bind(params).stack)
    paths = [path for path, _ in nnx.to_flat_state(whole)]
    assert all(path[-1] == "values" for path in paths)
    return {".".join(map(str, path[:-1])) for path in paths}


@pytest.mark.parametrize("name", WAYS)
def test_whole_matrices_give_what_their_slices_give(
    name: str, request: pytest.FixtureRequest
) -> None:
    found, params = few_bits(WAYS[name])
    assert left_whole(found, params) == set()
    sliced = features(found, params)
    request.getfixturevalue("for_tpu")
    assert left_whole(found, params) == IN_PLACE
    np.testing.assert_allclose(features(found, params), sliced, rtol=1e-5, atol=1e-6)


def test_on_a_mesh_they_do_too(request: pytest.FixtureRequest) -> None:
    found, params = few_bits(WAYS["int8"])
    plan = plan_of(found.spec, "cpu:8", data=4, tensor=2)
    with annotated_by(MeshSharder(plan, device_mesh(plan, jax.devices()))):
        sliced = features(found, params)
        request.getfixturevalue("for_tpu")
        assert left_whole(found, params) == IN_PLACE
        made = features(found, params)
    np.testing.assert_allclose(made, sliced, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("for_tpu")
def test_what_a_device_must_gather_is_sliced_first() -> None:
    found, params = few_bits(WAYS["int8"])
    plan = plan_of(found.spec, "cpu:8", fsdp=4, tensor=2)
    with annotated_by(MeshSharder(plan, device_mesh(plan, jax.devices()))):
        assert left_whole(found, params) == set()


@pytest.mark.usefixtures("for_tpu")
def test_a_model_in_floating_point_is_sliced() -> None:
    assert left_whole(*few_bits(None)) == set()


@pytest.mark.parametrize("tensor", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_the_tpu_compiler_slices_none_of_them(
    tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("libtpu")
    # Other processes may be asking the same compiler; no TPU is opened.
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # A small vocabulary compiles sooner; of few layers, all might be fetched ahead.
    large = replace(load_model("llama3_8b"), vocab_size=1024)
    large = replace(large, quantization=WAYS["W8A8"]).check()
    plan = plan_of(large, {1: "v5e:1x1", 4: "v5e:2x2"}[tensor], tensor=tensor)
    config = load_config(None, ["model=llama3_8b", "serve.weight_dtype=int8"]).config
    mesh = device_mesh(plan, compile_devices(plan.topology))
    text = lower_decode_step(plan, config, mesh).as_text()
    assert len(re.findall(r"%int8_matmul\S* = ", text)) >= 4
    D, F, N = large.embed_dim, large.ffn_dim // tensor, large.num_heads // tensor
    made = set(re.findall(r"= \(?s8\[([0-9,]+)\]\S* (?!parameter|get-|bitcast)", text))
    matrices = {f"{D},{F}", f"{F},{D}", f"{N},{large.head_dim},{D}"}
    sliced = {shape for shape in made if any(shape.endswith(m) for m in matrices)}
    assert not sliced
