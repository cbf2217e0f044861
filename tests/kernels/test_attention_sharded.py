"""Attention split over a mesh: the same numbers, and no whole scores on a TPU."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.ir import MeshShape, ModelSpec, Rules
from llmos_jax.kernels.attention import CONTEXT, attention, blocked
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering import MeshSharder
from llmos_jax.models import annotated_by
from llmos_jax.models.attention import Attention

RELATIVE = 1e-5
"""Of the largest entry; other orders of float32 sums."""


def sharder(devices: list[jax.Device], **sizes: int) -> MeshSharder:
    """Heads over tensor, sequences over fsdp, tokens over context."""
    rules = Rules(
        family="test",
        weights={},
        activations={
            "batch": ("fsdp",),
            "seq": ("context",),
            "heads": ("tensor",),
            "kv_heads": ("tensor",),
            "head_dim": (),
        },
        uneven="replicate",
    )
    shape = MeshShape(**sizes)
    array = np.array(devices[: shape.num_devices]).reshape(tuple(sizes.values()))
    plan = SimpleNamespace(rules=rules, mesh=shape)
    return MeshSharder(plan, Mesh(array, tuple(sizes)))


Params = dict[str, jax.Array]


def layer_of(spec: ModelSpec) -> tuple[Params, Callable[..., jax.Array]]:
    """Parameters of an attention layer, and the layer as a function."""
    with nnx.use_eager_sharding(False):
        made = Attention(spec, rngs=nnx.Rngs(0))
    graph, flat = nnx.graphdef(made), nnx.to_flat_state(nnx.state(made))

    def apply(params: Params, x: jax.Array, cos: jax.Array, sin: jax.Array):
        state = [(tuple(path.split(".")), nnx.Param(params[path])) for path in params]
        return nnx.merge(graph, nnx.from_flat_state(state))(x, None, (cos, sin))[0]

    return {".".join(path): leaf.get_value() for path, leaf in flat}, apply


@pytest.mark.parametrize("block", [512, 32], ids=["reference", "blocked"])
@pytest.mark.parametrize(
    ("num_kv_heads", "sizes"),
    [
        (4, {"fsdp": 2, "tensor": 4}),
        (2, {"fsdp": 2, "tensor": 4}),
        (2, {"context": 4, "tensor": 2}),
    ],
    ids=["heads split", "too few kv heads", "tokens split"],
)
def test_a_mesh_changes_nothing(
    tiny: ModelSpec,
    num_kv_heads: int,
    sizes: dict[str, int],
    block: int,
    key: jax.Array,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocked, "BLOCK", block)
    spec = dataclasses.replace(
        tiny, num_heads=8, num_kv_heads=num_kv_heads, head_dim=16, qk_norm=True
    )
    params, apply = layer_of(spec)
    x_BTD = jax.random.normal(key, (2, 96, spec.embed_dim))
    angle = jax.random.uniform(key, (2, 96, spec.head_dim // 2), maxval=7.0)

    def run(params: Params, x_BTD: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(apply(params, x_BTD, jnp.cos(angle), jnp.sin(angle))))

    gradients = jax.value_and_grad(run, argnums=(0, 1))
    alone = jax.jit(gradients)(params, x_BTD)
    with annotated_by(sharder(jax.devices(), **sizes)):
        split = jax.jit(lambda *arrays: gradients(*arrays))(params, x_BTD)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=RELATIVE * scale)


@pytest.mark.parametrize("name", ["blocked", "reference", "splash"])
def test_an_implementation_runs_on_each_devices_heads(
    name: str, key: jax.Array
) -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "tensor"))
    spec = PartitionSpec("data", None, "tensor", None)
    q = jax.random.normal(key, (4, 130, 4, 16))
    k = v = jax.random.normal(key, (4, 130, 2, 16))

    def run(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention(q, k, v, None, implementation=name)

    split = jax.shard_map(
        run, mesh=mesh, in_specs=(spec,) * 3, out_specs=spec, check_vma=False
    )
    expected = attention(q, k, v, None, implementation="reference")
    np.testing.assert_allclose(jax.jit(split)(q, k, v), expected, atol=RELATIVE)


@pytest.mark.parametrize(
    ("topology", "sizes"),
    [("v5e:2x4", {"fsdp": 4, "tensor": 2}), ("v5p:2x2x1", {"fsdp": 2, "tensor": 2})],
)
def test_a_tpu_never_holds_whole_scores(
    tiny: ModelSpec,
    topology: str,
    sizes: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    # Other processes may be asking the same compiler; no TPU is opened.
    monkeypatch.setitem(os.environ, "ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    chips = sharder(list(devices.devices), **sizes)
    T, H = 2048, 128
    spec = dataclasses.replace(
        tiny, embed_dim=256, num_heads=4, num_kv_heads=2, head_dim=H
    )
    params, apply = layer_of(spec)
    rows = NamedSharding(chips.mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(chips.mesh, PartitionSpec())

    def abstract(shape: tuple[int, ...], dtype: str, where: NamedSharding):
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)

    save = jax.checkpoint_policies.save_only_these_names(CONTEXT)
    layer = jax.checkpoint(apply, policy=save, prevent_cse=False)

    def loss(*arrays: jax.Array) -> jax.Array:
        return jnp.sum(layer(*arrays).astype(jnp.float32))

    B = sizes["fsdp"]
    angle = abstract((B, T, H // 2), "float32", rows)
    weights = jax.tree.map(lambda x: abstract(x.shape, "bfloat16", whole), params)
    x_BTD = abstract((B, T, spec.embed_dim), "bfloat16", rows)
    target = Target("tpu", chips.mesh.size)
    with annotated_by(chips), lowered_for(target):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = gradient.lower(weights, x_BTD, angle, angle).compile()
    text = compiled.as_text()
    # Forward once, for the context is saved; dq; dk and dv.
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.search(rf"f32\[[0-9,]*{T},{T}\]", text)
    scores_bytes = 4 * spec.num_heads // sizes["tensor"] * T * T
    assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes // 2
