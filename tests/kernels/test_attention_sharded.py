"""Attention split over a mesh: the same numbers, and no whole scores on a TPU."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llmos_jax.ir import EXCHANGES, MESH_AXES, MeshShape, ModelSpec, Rules
from llmos_jax.kernels.attention import CONTEXT, attention, blocked
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering import MeshSharder
from llmos_jax.models import Pass, along, annotated_by, skeleton
from llmos_jax.models.attention import Attention, Sight, token_order
from llmos_jax.rules import load_rules

pytestmark = pytest.mark.slow

RELATIVE = 1e-5
"""Of the largest entry; other orders of float32 sums."""


RULES = Rules(
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
"""Heads over tensor, sequences over fsdp, tokens over context."""


def sharder(
    devices: list[jax.Device], rules: Rules = RULES, **sizes: int
) -> MeshSharder:
    shape = MeshShape(**sizes)
    array = np.array(devices[: shape.num_devices])
    array = array.reshape([shape.sizes[axis] for axis in MESH_AXES])
    plan = SimpleNamespace(rules=rules, mesh=shape)
    return MeshSharder(plan, Mesh(array, MESH_AXES))


Params = dict[str, jax.Array]


def layer_of(spec: ModelSpec) -> tuple[Params, Callable[..., jax.Array]]:
    """Parameters of an attention layer, and the layer as a function."""
    with nnx.use_eager_sharding(False):
        made = Attention(spec, rngs=nnx.Rngs(0))
    graph, flat = nnx.graphdef(made), nnx.to_flat_state(nnx.state(made))

    def apply(params: Params, x: jax.Array, sight: Sight) -> jax.Array:
        state = [(tuple(path.split(".")), nnx.Param(params[path])) for path in params]
        return nnx.merge(graph, nnx.from_flat_state(state))(x, sight)[0]

    return {".".join(path): leaf.get_value() for path, leaf in flat}, apply


def in_order(x: Any, order: np.ndarray | None) -> Any:
    """Every [B, T, ...] array with its tokens in an order."""
    if order is None:
        return x
    return jax.tree.map(lambda leaf: leaf if leaf is None else leaf[:, order], x)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("block", [512, 32], ids=["reference", "blocked"])
@pytest.mark.parametrize(
    ("num_kv_heads", "sizes", "exchange"),
    [
        (4, {"fsdp": 2, "tensor": 4}, "ring"),
        (2, {"fsdp": 2, "tensor": 4}, "ring"),
        (2, {"context": 4, "tensor": 2}, "ring"),
        (2, {"context": 2, "tensor": 4}, "gather"),
    ],
    ids=["heads split", "too few kv heads", "tokens split", "kv gathered"],
)
def test_a_mesh_changes_nothing(
    tiny: ModelSpec,
    num_kv_heads: int,
    sizes: dict[str, int],
    exchange: str,
    block: int,
    segmented: bool,
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
    segment_BT = jnp.arange(2 * 96).reshape(2, 96) // 23 if segmented else None
    seen_by = (jnp.cos(angle), jnp.sin(angle)), segment_BT

    def run(params: Params, x_BTD: jax.Array, seen_by: Any) -> jax.Array:
        sight = Sight(None, *seen_by, exchange)
        return jnp.sum(jnp.sin(apply(params, x_BTD, sight)))

    gradients = jax.value_and_grad(run, argnums=(0, 1))
    loss, (dparams, dx_BTD) = jax.jit(gradients)(params, x_BTD, seen_by)
    with annotated_by(sharder(jax.devices(), **sizes)):
        order = token_order(96)
        assert (order is not None) == ("context" in sizes)
        split = jax.jit(lambda *arrays: gradients(*arrays))(
            params, in_order(x_BTD, order), in_order(seen_by, order)
        )
    alone = loss, (dparams, in_order(dx_BTD, order))
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=RELATIVE * scale)


@pytest.mark.parametrize(
    "sizes",
    [
        {"context": 2},
        pytest.param({"context": 4, "tensor": 2}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "exchange", [EXCHANGES[0], pytest.param(EXCHANGES[1], marks=pytest.mark.slow)]
)
def test_a_decoder_learns_the_same_where_sequences_are_split(
    tiny: ModelSpec, exchange: str, sizes: dict[str, int], key: jax.Array
) -> None:
    found = skeleton(tiny)
    B, T = 2, 32
    tokens_BT, targets_BT = jax.random.randint(key, (2, B, T), 0, tiny.vocab_size)
    segment_BT = jnp.arange(B * T).reshape(B, T) // 11
    batch = tokens_BT, targets_BT, segment_BT

    def loss(params: Params, batch: tuple[jax.Array, ...]) -> jax.Array:
        model, (tokens, targets, segment) = found.bind(params), batch
        features, _ = model.routed_features(tokens, segment, Pass(exchange=exchange))
        scores = jax.nn.log_softmax(model.logits(features))
        return -jnp.mean(jnp.take_along_axis(scores, targets[..., None], axis=-1))

    params = found.init(key)
    alone = jax.jit(jax.value_and_grad(loss))(params, batch)
    rules = load_rules("llama")
    with annotated_by(sharder(jax.devices(), rules, **sizes)):
        batch = in_order(batch, token_order(T))
        split = jax.jit(lambda *args: jax.value_and_grad(loss)(*args))(params, batch)
    for a, b in zip(jax.tree.leaves(split), jax.tree.leaves(alone), strict=True):
        scale = float(jnp.max(jnp.abs(b)))
        np.testing.assert_allclose(a, b, rtol=0, atol=RELATIVE * scale)


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_sequences_may_be_split_inside_a_stage(
    tiny: ModelSpec, exchange: str, key: jax.Array
) -> None:
    spec = dataclasses.replace(tiny, num_heads=4, num_kv_heads=2, head_dim=16)
    params, apply = layer_of(spec)
    x_BTD = jax.random.normal(key, (2, 32, spec.embed_dim))
    angle = jax.random.uniform(key, (2, 32, spec.head_dim // 2), maxval=7.0)
    angles = jnp.cos(angle), jnp.sin(angle)

    def run(x_BTD: jax.Array, angles: Any) -> jax.Array:
        return jnp.sin(apply(params, x_BTD, Sight(None, angles, None, exchange)))

    def gradient(run: Callable[..., jax.Array], x_BTD: jax.Array, angles: Any):
        return jax.jit(jax.grad(lambda x: jnp.sum(run(x, angles))))(x_BTD)

    expected = gradient(run, x_BTD, angles)
    none, stages = PartitionSpec(), PartitionSpec("stage")

    def staged(x_BTD: jax.Array, angles: Any) -> jax.Array:
        twice = jnp.stack([x_BTD, 0 * x_BTD])
        out = along(
            *(("stage",), lambda x, angles: run(x[0], angles)[None], twice, angles),
            in_split=(stages, none),
            out_split=stages,
        )
        return out[0]

    with annotated_by(sharder(jax.devices(), stage=2, context=2, tensor=2)):
        order = token_order(32)
        got = gradient(staged, x_BTD[:, order], in_order(angles, order))
    scale = float(jnp.max(jnp.abs(expected)))
    np.testing.assert_allclose(got, expected[:, order], rtol=0, atol=RELATIVE * scale)


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

    def loss(params: Params, x: jax.Array, angles: tuple[jax.Array, ...]) -> jax.Array:
        def layer(x: jax.Array) -> jax.Array:
            return apply(params, x, Sight(None, angles))

        remade = jax.checkpoint(layer, policy=save, prevent_cse=False)
        return jnp.sum(remade(x).astype(jnp.float32))

    B = sizes["fsdp"]
    angle = abstract((B, T, H // 2), "float32", rows)
    weights = jax.tree.map(lambda x: abstract(x.shape, "bfloat16", whole), params)
    x_BTD = abstract((B, T, spec.embed_dim), "bfloat16", rows)
    target = Target("tpu", chips.mesh.size)
    with annotated_by(chips), lowered_for(target):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        compiled = gradient.lower(weights, x_BTD, (angle, angle)).compile()
    text = compiled.as_text()
    # Forward once, for the context is saved; dq; dk and dv.
    assert text.count('custom_call_target="tpu_custom_call"') == 3
    assert not re.search(rf"f32\[[0-9,]*{T},{T}\]", text)
    scores_bytes = 4 * spec.num_heads // sizes["tensor"] * T * T
    assert compiled.memory_analysis().temp_size_in_bytes < scores_bytes // 2
