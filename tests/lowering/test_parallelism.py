"""Every parallelism, alone and together, computes what one device computes.

A case is a mesh and how it is run. Ten steps of AdamW in float32 must give the losses
of the plain step on one device, and the first step its gradients. Adam's first moment
is (1 - beta1) times the gradient after one step, so that is where it is read.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import FLOAT32_RELATIVE

from llmos_jax import models, training
from llmos_jax.config import load_config, load_model
from llmos_jax.data import TokenFile, TrainBatches, evaluation_batches
from llmos_jax.driver import plan as plan_of
from llmos_jax.ir import Way
from llmos_jax.lowering import fetch
from llmos_jax.training.router import RouterWeights

B, T, STEPS = 16, 32, 10
GRADIENT_RELATIVE = 1e-4
"""Of the largest entry of each gradient: sums of 16 x 32 tokens in another order."""

DENSE = """
family = "llama"
num_layers = 8
embed_dim = 32
ffn_dim = 64
num_heads = 8
num_kv_heads = 8
head_dim = 8
vocab_size = 64
max_seq_len = 64
tied_embeddings = true
"""
MOE = (
    DENSE.replace("llama", "moe")
    .replace("tied_embeddings = true", "tied_embeddings = false")
    .replace("num_kv_heads = 8", "num_kv_heads = 4")
    + "num_experts = 8\nexperts_per_token = 2\nqk_norm = true\n"
)
GEMMA = (
    DENSE.replace("num_kv_heads = 8", "num_kv_heads = 4")
    + """
activation = "gelu_tanh"
norm_offset = true
post_norms = true
scaled_embeddings = true
qk_norm = true
qkv_bias = true
out_bias = true
attention_scale = 0.25
attention_softcap = 5.0
logit_softcap = 8.0
sliding_window = 6
layer_pattern = ["sliding", "full"]
local_rope_theta = 100.0
"""
)
"""Everything that a Gemma, a Qwen or a Mistral has and a Llama has not."""
LORA = (
    DENSE
    + """
[lora]
rank = 4
alpha = 8.0
targets = ["q", "k", "v", "o", "gate", "up", "down"]
"""
)
FILES = {"dense": DENSE, "moe": MOE, "gemma": GEMMA, "lora": LORA}

ONE_F_ONE_B = {"schedule": "1f1b"}
CIRCULAR = {"schedule": "circular", "rounds": 2}
GATHER = {"context_exchange": "gather"}
FULL, DOTS = {"remat": "full"}, {"remat": "dots"}
TWO_SLICES = {"topology": "2*cpu:4"}

QUICK = [
    # schedules, sequence-parallel tensor, tiles of the loss, two slices
    ("dense", {"stage": 4, "fsdp": 2}, {"microbatches": 4, **ONE_F_ONE_B}),
    ("dense", {"stage": 2, "tensor": 4}, {"microbatches": 4, **CIRCULAR, **FULL}),
    ("dense", {"fsdp": 2, "context": 4}, {"loss_tiles": 4}),
    ("moe", {"data": 2, "expert": 4}, TWO_SLICES),
    # sliding layers and what comes with them
    ("gemma", {"fsdp": 2, "tensor": 4}, {"loss_tiles": 2}),
]
THOROUGH = [
    # one axis alone
    ("dense", {"tensor": 8}, {}),
    ("dense", {"context": 8}, {}),
    ("moe", {"expert": 8}, {}),
    ("dense", {"stage": 8}, {"microbatches": 8}),
    ("dense", {"data": 8}, {}),
    ("dense", {"fsdp": 8}, {}),
    ("dense", {"context": 8}, GATHER),
    # pairs
    ("dense", {"data": 2, "fsdp": 4}, {"microbatches": 2}),
    ("dense", {"fsdp": 4, "tensor": 2}, FULL),
    ("dense", {"data": 4, "context": 2}, {}),
    ("dense", {"fsdp": 2, "context": 4}, FULL),
    ("dense", {"context": 4, "tensor": 2}, GATHER),
    ("dense", {"stage": 4, "data": 2}, {"microbatches": 4}),
    ("dense", {"stage": 2, "tensor": 4}, {"microbatches": 4, **ONE_F_ONE_B, **FULL}),
    ("dense", {"stage": 2, "context": 4}, {"microbatches": 2}),
    ("moe", {"fsdp": 8}, {}),
    ("moe", {"fsdp": 2, "expert": 4}, FULL),
    ("moe", {"expert": 2, "tensor": 4}, {}),
    ("moe", {"context": 2, "expert": 4}, {}),
    ("moe", {"stage": 4, "expert": 2}, {"microbatches": 4}),
    # triples
    ("dense", {"data": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 2, **DOTS}),
    ("dense", {"fsdp": 2, "context": 2, "tensor": 2}, {}),
    ("dense", {"stage": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 4, **CIRCULAR}),
    ("dense", {"stage": 2, "fsdp": 2, "context": 2}, {"microbatches": 4, **FULL}),
    ("moe", {"stage": 2, "fsdp": 2, "expert": 2}, {"microbatches": 4, **ONE_F_ONE_B}),
    ("moe", {"stage": 2, "data": 2, "tensor": 2}, {"microbatches": 4, **CIRCULAR}),
    ("moe", {"fsdp": 2, "expert": 2, "tensor": 2}, DOTS),
    # the loss in tiles
    ("dense", {"stage": 4, "tensor": 2}, {"microbatches": 4, "loss_tiles": 2}),
    # sliding layers, frozen weights
    ("gemma", {"stage": 4, "fsdp": 2}, {"microbatches": 4, **ONE_F_ONE_B}),
    ("gemma", {"stage": 2, "data": 4}, {"microbatches": 4, **CIRCULAR, **FULL}),
    ("gemma", {"fsdp": 8}, DOTS),
    ("lora", {"stage": 2, "fsdp": 2, "tensor": 2}, {"microbatches": 4, **ONE_F_ONE_B}),
    ("lora", {"fsdp": 4, "tensor": 2}, {"microbatches": 2, **FULL}),
    ("lora", {"stage": 4, "data": 2}, {"microbatches": 4, **CIRCULAR}),
    ("lora", {"context": 2, "tensor": 4}, {}),
    # two slices
    ("dense", {"data": 2, "fsdp": 4}, TWO_SLICES),
    ("dense", {"stage": 2, "fsdp": 4}, {"microbatches": 4, **TWO_SLICES, **CIRCULAR}),
]
CASES = [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in THOROUGH)]


def name_of(case):
    kind, mesh, more = case
    return "-".join(
        [kind, *(f"{k}{v}" for k, v in mesh.items()), *map(str, more.values())]
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("parallelism")


@pytest.fixture(scope="module")
def model_files(folder):
    for kind, text in FILES.items():
        (folder / f"{kind}.toml").write_text(text)
    return {kind: folder / f"{kind}.toml" for kind in FILES}


@pytest.fixture(scope="module")
def tokens(folder):
    path = folder / "train.bin"
    ids = np.random.default_rng(0).integers(0, 16, 6000).astype("uint16")
    ids.tofile(path)
    return TokenFile(
        path=path,
        dtype="uint16",
        num_tokens=ids.size,
        num_bytes=ids.size,
        num_documents=1,
        fingerprint="random",
    )


def config_of(model, mesh, more):
    """As a user would ask for it."""
    settings = {
        "model": model,
        "batch.seq_len": T,
        "batch.global": B,
        "train.steps": STEPS,
        "train.compute_dtype": "float32",
        "train.learning_rate": 3e-3,
        "train.warmup_steps": 3,
        "train.clip_norm": 1e9,
        "plan.remat": "none",
        "plan.microbatches": 1,
        **{f"plan.mesh.{axis}": size for axis, size in mesh.items()},
        **{
            key if key == "topology" else f"plan.{key}": value
            for key, value in more.items()
        },
    }
    return load_config(None, [f"{key}={value}" for key, value in settings.items()])


def source_of(tokens, rows=None):
    return TrainBatches(
        tokens, seq_len=T, global_batch=B, seed=0, rows=rows, prefetch=False
    )


FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
"""What is compared is what is computed, not how fast; it halves the time to compile."""


def run(step, state, batches, beta1):
    """Losses of all steps, and the first one's gradients."""
    losses, gradients = [], {}
    for _, batch in zip(range(STEPS), batches):
        state, metrics = step(state, batch)
        losses.append(float(fetch(metrics["loss"])))
        gradients = gradients or {
            path: np.asarray(mu) / (1 - beta1)
            for path, mu in state.optimizer[1].mu.items()
        }
    return losses, gradients


@pytest.fixture(scope="module")
def first_state(model_files):
    """Drawn whole; test_meshes.py shows that it is the same drawn in shards."""

    @functools.cache
    def draw(kind):
        config = config_of(model_files[kind], {}, {}).config
        skeleton = models.skeleton(load_model(str(model_files[kind])))
        optimizer = training.make_optimizer(config.train, skeleton.table)
        state = training.init_state(skeleton, optimizer, config.run.seed)
        return jax.tree.map(np.asarray, state)  # what is donated must be a copy

    return draw


@pytest.fixture(scope="module")
def on_one_device(model_files, tokens, first_state):
    """The oracle: the plain step jitted on one device, without plan or mesh; routers
    balance each microbatch by itself, so it depends on their number."""

    @functools.cache
    def oracle(kind, microbatches):
        config = config_of(model_files[kind], {}, {}).config
        skeleton = models.skeleton(load_model(str(model_files[kind])))
        optimizer = training.make_optimizer(config.train, skeleton.table)
        step = training.train_step(
            skeleton,
            optimizer,
            compute_dtype="float32",
            way=Way(microbatches=microbatches),
            router_weights=RouterWeights(
                balance=config.train.router_balance_weight,
                z=config.train.router_z_weight,
            ),
        )
        found = run(
            jax.jit(step), first_state(kind), source_of(tokens), config.train.beta1
        )
        assert found[0][0] - found[0][-1] > 1e-3, "the steps must change the model"
        return found

    return oracle


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_it_computes_what_one_device_computes(
    case, model_files, tokens, first_state, on_one_device
):
    kind, mesh, more = case
    config = config_of(model_files[kind], mesh, more).config
    chosen = plan_of(config)
    assert {a: n for a, n in chosen.mesh.sizes.items() if n > 1} == mesh
    for key, value in more.items():
        assert key == "topology" or getattr(chosen.way, key) == value
    session = training.open_session(models.skeleton(chosen.params.spec), chosen, config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, session.state_shape)
    state = jax.device_put(first_state(kind), shardings)
    session.program.compile(FAST_TO_COMPILE)
    batches = session.batches(source_of(tokens, session.rows))
    losses, gradients = run(session.program, state, batches, config.train.beta1)
    expected = on_one_device(kind, chosen.microbatches)
    np.testing.assert_allclose(losses, expected[0], rtol=FLOAT32_RELATIVE)
    for path, gradient in gradients.items():
        wanted = expected[1][path]
        np.testing.assert_allclose(
            *(gradient, wanted),
            rtol=0,
            atol=GRADIENT_RELATIVE * float(np.max(np.abs(wanted))),
            err_msg=path,
        )


SCORED = [
    ("dense", {"stage": 2, "context": 4}, {"microbatches": 4, **CIRCULAR}),
    pytest.param(
        ("moe", {"stage": 2, "expert": 4}, {"microbatches": 2}), marks=pytest.mark.slow
    ),
]


@pytest.mark.parametrize("case", SCORED, ids=name_of)
def test_text_is_scored_as_on_one_device(case, model_files, tokens):
    kind, mesh, more = case
    config = config_of(model_files[kind], mesh, more).config
    chosen = plan_of(config)
    session = training.open_session(models.skeleton(chosen.params.spec), chosen, config)
    found = session.score(session.fresh().params, tokens, 2)
    plain = jax.jit(training.score_step(session.skeleton, compute_dtype="float32"))
    params = session.skeleton.init(jax.random.key(config.run.seed))
    batches = evaluation_batches(tokens, seq_len=T, batch=B, limit=2)
    wanted = training.total_score(
        fetch(plain(params, jax.tree.map(jnp.asarray, batch))) for batch in batches
    )
    assert (found.tokens, found.correct) == (wanted.tokens, wanted.correct)
    assert found.nats == pytest.approx(wanted.nats, rel=FLOAT32_RELATIVE)


def test_all_six_axes_and_every_schedule_are_covered():
    for cases in (QUICK, THOROUGH):
        axes = {axis for _, mesh, _ in cases for axis in mesh}
        assert axes == set(dataclasses.asdict(Way().mesh))
        schedules = {more.get("schedule") for _, _, more in cases}
        assert schedules == {"1f1b", "circular", None}
