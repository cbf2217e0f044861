"""Prefill and decode steps of a plan: what they compute on a mesh, and what compilers
for chips that are not here make of them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from llmos_jax import driver, lowering, models, serving
from llmos_jax.errors import LowerError
from llmos_jax.ir import Quantization
from llmos_jax.lowering.verify import PROBE_EFFORT
from llmos_jax.serving.planned import ANY
from llmos_jax.serving.step import FREE

B, S = 8, 128
WARM = serving.Sampling(temperature=1.0, top_k=20, seed=3)
GREEDY = serving.Sampling()

MODEL = small.MODEL.replace("num_kv_heads = 4", "num_kv_heads = 2").replace(
    "tied_embeddings = true", "tied_embeddings = false"
)
"""Fewer key/value heads than devices that share a layer."""


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "two_heads.toml"
    path.write_text(MODEL, encoding="utf-8")
    return path


def config_of(model, topology, phase, *texts):
    return small.config_of(
        [
            *(f"model={model}", f"topology={topology}", f"plan.phase={phase}"),
            *(f"batch.global={B}", f"batch.seq_len={S}", "serve.weight_dtype=int8"),
            *("serve.kv_dtype=int8", "train.compute_dtype=float32", *texts),
        ]
    )


def lowered(config):
    """The plan's step for simulated devices, its plan, and its mesh."""
    chosen = serving.with_repeated_heads(driver.plan(config))
    mesh = lowering.device_mesh(chosen, jax.devices())
    build = {
        "decode": serving.lower_decode_step,
        "prefill": serving.lower_prefill_step,
    }[config.plan.phase]
    return build(chosen, config, mesh), chosen


def drawn(skeleton):
    """Parameters of a model in few bits, at random."""
    keys = jax.random.split(jax.random.key(0), len(skeleton.table.rows))
    made = {}
    for row, key in zip(skeleton.table.rows, keys, strict=True):
        if row.dtype == "int8":
            made[row.path] = jax.random.randint(key, row.shape, -127, 128, jnp.int8)
        elif row.path.replace("scale", "values") in made:
            made[row.path] = jnp.full(row.shape, 2e-3, jnp.float32)
        else:
            made[row.path] = jnp.ones(row.shape, jnp.float32)
    return made


def filled(skeleton):
    """Parameters, scales after their values."""
    rows = sorted(skeleton.table.rows, key=lambda row: row.path.endswith("scale"))
    table = replace(skeleton.table, rows=tuple(rows))
    return drawn(replace(skeleton, table=table))


def placed(tree, like):
    return jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), tree, like)


def rows_of(samplings, prompt, limit):
    rows = [
        FREE._replace(prompt=prompt, limit=limit, sampling=one) for one in samplings
    ]
    return serving.rows_on_device(rows, serving.Needs.of([ANY]))


def alone(config, skeleton):
    """The same programs on one device, of the model as it is."""
    model = serving.DecoderForward(skeleton, config.serve.kv_dtype)
    state = serving.empty_state(model, B, S)
    return serving.programs(model, skeleton.spec.vocab_size), state


SAMPLINGS = [GREEDY, WARM] * (B // 2)


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param({"data": 2, "tensor": 4}, marks=pytest.mark.slow),
        pytest.param({"tensor": 8}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 8}, marks=pytest.mark.slow),
    ],
)
def test_a_decode_step_says_on_a_mesh_what_it_says_on_one_device(two_heads, mesh):
    """Also where each key/value head is kept by several devices."""
    pins = [f"plan.mesh.{axis}={size}" for axis, size in mesh.items()]
    # Not int8: sums in another order round a key otherwise now and then.
    config = config_of(two_heads, "cpu:8", "decode", "serve.kv_dtype=float32", *pins)
    program, chosen = lowered(config)
    skeleton = models.skeleton(
        replace(chosen.params.spec, num_kv_heads=2, quantization=Quantization())
    )
    params = filled(skeleton)
    first = jnp.arange(1, B + 1, dtype=jnp.int32) * 7
    rows, steps = rows_of(SAMPLINGS, 1, S), jnp.int32(12)

    def begun(state):
        pool = state.pool.at[:, 0].set(first)
        return state._replace(pool=pool, position=jnp.ones_like(state.position))

    programs, state = alone(config, skeleton)
    want = programs.decode(params, begun(state), rows, steps, jnp.int32(1))[1]
    wide = serving.DecoderForward(models.skeleton(chosen.params.spec), "float32")
    given = (
        serving.repeated_params(params, chosen.params),
        begun(serving.empty_state(wide, B, S)),
        *(rows, steps, jnp.int32(1)),
    )
    state, found = program(*placed(given, program.arguments))
    assert np.array_equal(found, want)
    assert (found[:, :12] >= 0).all() and len(np.unique(found[:, :12])) > B
    if mesh.get("tensor") == 8:
        assert state.cache.k.shape[2] == 8
        assert state.cache.k.addressable_shards[0].data.shape[2] == 1


def test_a_prefill_step_says_on_a_mesh_what_it_says_on_one_device(two_heads):
    pins = ("plan.mesh.fsdp=4", "plan.mesh.tensor=2")
    config = config_of(two_heads, "cpu:8", "prefill", "serve.kv_dtype=float32", *pins)
    program, chosen = lowered(config)
    skeleton = models.skeleton(chosen.params.spec)
    params = filled(skeleton)
    lengths = [65, 128, 96, 127, 77, 90, 100, 81]  # one program for all
    tokens = np.random.default_rng(0).integers(0, 512, (B, S)).astype(np.int32)
    rows = rows_of(SAMPLINGS, 1, S)._replace(prompt=jnp.asarray(lengths, jnp.int32))

    model = serving.DecoderForward(skeleton, "float32")
    runner = serving.Runner(model, params, vocab_size=512)
    state, want = runner.empty_state(B, S), []
    for slot, length in enumerate(lengths):
        row = FREE._replace(prompt=length, limit=S, sampling=SAMPLINGS[slot])
        needs = serving.Needs.of([ANY])
        prompt = tokens[slot, :length]
        state, token = runner.prefill(state, slot, prompt, row, needs)
        want.append(token)
    begin = serving.empty_state(model, B, S)
    made, found = program(*placed((params, begin, tokens, rows), program.arguments))
    assert found.tolist() == want
    assert np.array_equal(made.pool, state.pool)
    assert np.array_equal(made.position, state.position)
    seen = np.arange(S)[None, :] < np.array(lengths)[:, None]
    keys = (np.moveaxis(np.asarray(x.cache.k), 3, 2)[:, seen] for x in (made, state))
    np.testing.assert_allclose(*keys, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "phase", ["prefill", pytest.param("decode", marks=pytest.mark.slow)]
)
def test_what_serves_is_verified_like_what_trains(two_heads, phase):
    pins = ("plan.mesh.data=2", "plan.mesh.fsdp=2", "plan.mesh.tensor=2")
    found = driver.plan(config_of(two_heads, "cpu:8", phase, *pins), "compile")
    assert found.compiled is not None and found.compiled["audited"]
    assert found.compiled["unplanned_collectives"] == []
    assert {row["op"] for row in found.compiled["collectives"]} >= {"all-reduce"}
    assert "The compiler (compile) says" in found.explain()


@pytest.mark.parametrize(
    ("texts", "match"),
    [
        (("serve.kv_dtype=float8",), "kv_dtype = float8 is planned in closed form"),
        (("model=mixtral_8x7b",), "has experts, whose few-bit product"),
        (("plan.mesh.context=2",), "no decode step runs on context=2"),
    ],
)
def test_what_no_step_does_is_refused_in_one_sentence(two_heads, texts, match):
    config = config_of(two_heads, "v5e:2x4", "decode", *texts)
    chosen = driver.plan(config)
    with pytest.raises(LowerError, match=match):
        serving.lower_decode_step(chosen, config, mesh=None)


TPU_MODEL = """
family = "llama"
num_layers = 2
embed_dim = 512
ffn_dim = 2048
num_heads = 16
num_kv_heads = 2
head_dim = 128
vocab_size = 2048
max_seq_len = 1024
"""


def for_tpu(tmp_path, topology, *texts):
    """What a TPU's compiler makes of a small model's decode step: text and facts."""
    pytest.importorskip("libtpu")
    path = tmp_path / "model.toml"
    path.write_text(TPU_MODEL, encoding="utf-8")
    asked = ("train.compute_dtype=bfloat16", "plan.mesh.tensor=4", *texts)
    config = config_of(path, topology, "decode", *asked)
    chosen = serving.with_repeated_heads(driver.plan(config))
    mesh = lowering.device_mesh(chosen, lowering.compile_devices(chosen.topology))
    program = serving.lower_decode_step(chosen, config, mesh)
    found = lowering.compile_plan(chosen, lambda plan: (program, mesh), PROBE_EFFORT)
    assert found["audited"] and found["unplanned_collectives"] == []
    return program.as_text(), found["collectives"], chosen


def test_a_tpu_decodes_with_our_kernels_and_only_planned_collectives(tmp_path):
    """Two key/value heads over four chips that are not here."""
    text, found, chosen = for_tpu(tmp_path, "v5e:2x2")
    assert chosen.params.spec.num_kv_heads == 4
    for kernel in ("int8_matmul_int8_int8", "decode_attention", "write_tokens"):
        assert f"%{kernel}" in text, kernel
    assert {row["op"] for row in found} >= {"all-reduce", "all-to-all"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "weights", "kernel"),
    [
        ("v5p:2x2x1", "int8", "int8_matmul_int8_int8"),
        ("v6e:2x2", "int8", "int8_matmul_int8_int8"),
        ("tpu7x:1x2x1", "float8", "int8_matmul_float8_float8"),
        ("v5e:2x2", "int4", "int8_matmul_int4_none_128"),
    ],
)
def test_every_tpu_decodes_with_the_kernel_of_its_kind(
    tmp_path, topology, weights, kernel
):
    group = ["serve.group=128"] if weights == "int4" else []
    text, *_ = for_tpu(tmp_path, topology, f"serve.weight_dtype={weights}", *group)
    assert f"%{kernel}" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "topology", "tensor"),
    [("llama3_8b", "v5e:2x4", 8), ("llama3_70b", "v5e:4x4", 16)],
)
def test_the_estimate_of_a_large_model_is_near_what_the_compiler_says(
    model, topology, tensor
):
    pytest.importorskip("libtpu")
    texts = ("train.compute_dtype=bfloat16", "batch.global=64", "batch.seq_len=2048")
    pin = f"plan.mesh.tensor={tensor}"
    config = config_of(model, topology, "decode", *texts, pin)
    chosen = driver.plan(config)
    skeleton = models.skeleton(chosen.params.spec)
    found = driver.ask_compiler(chosen, skeleton, config, "compile", PROBE_EFFORT)
    estimate = chosen.predicted.peak_hbm_bytes
    assert found["peak_hbm_bytes"] == pytest.approx(estimate, rel=0.15)
    assert found["audited"] and found["unplanned_collectives"] == []
