"""The engine's programs under a plan: they say on a mesh what they say on one device,
and compilers for chips that are not here take them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from llmos_jax import driver, lowering, models, serving
from llmos_jax.config import RunConfig
from llmos_jax.errors import LowerError
from llmos_jax.ir import Plan
from llmos_jax.lowering.verify import PROBE_EFFORT
from llmos_jax.scheduling import FULL, Request, Room, Sampling
from llmos_jax.scheduling.variant import DRAWN
from llmos_jax.serving.choose import Choice, rows_of_choices
from llmos_jax.serving.packing import packed
from llmos_jax.serving.steps import (
    DecodeRows,
    State,
    StepRows,
    decode_program,
    step_program,
)

B, S, C = 4, 256, 128
STEPS = 12
CHUNK = 64

MODEL = small.MODEL.replace("num_kv_heads = 4", "num_kv_heads = 2").replace(
    "max_seq_len = 128", f"max_seq_len = {S}"
)
"""Fewer key/value heads than devices that share a layer."""

ROOM = Room(
    seats=B,
    pages=8,
    page_size=C,
    context=S,
    step_tokens=CHUNK,
    vocab_size=512,
    is_ragged=False,
)
TABLE = np.array([[4, 7], [0, 5], [6, 1], [3, 2]], np.int32)


def config_of(model: Any, topology: str, *texts: str) -> RunConfig:
    return small.config_of(
        [
            *(f"model={model}", f"topology={topology}", "plan.phase=decode"),
            *(f"batch.global={B}", f"batch.seq_len={S}", f"serve.step_tokens={CHUNK}"),
            *("train.compute_dtype=float32", "serve.kv_dtype=float32"),
            *("plan.mesh.data=1", "plan.mesh.fsdp=1", *texts),
        ]
    )


class Sides:
    """A program on a mesh, and what it needs on one device."""

    def __init__(self, folder: Any, lower: Any):
        path = folder / "model.toml"
        path.write_text(MODEL, encoding="utf-8")
        config = config_of(path, "cpu:8", "plan.mesh.tensor=8")
        plan = driver.plan(config)
        wide = serving.with_repeated_heads(plan)
        assert serving.serves_pages(wide)
        mesh = lowering.device_mesh(wide, jax.devices())
        self.program = lower(wide, config, mesh)
        found = models.skeleton(plan.params.spec)
        params = jax.jit(found.init)(jax.random.key(0))
        self.params = found.cast(params, "float32")
        self.wide = {
            path: x.astype(self.program.arguments[0][path].dtype)
            for path, x in serving.repeated_params(self.params, wide.params).items()
        }
        # As the program gets them: rounded, if it asks for fewer bits.
        self.params = {
            path: x.astype(self.program.arguments[0][path].dtype).astype(x.dtype)
            for path, x in self.params.items()
        }
        self.model = serving.DecoderForward(found, "float32")

    def on_mesh(self, words: np.ndarray, pool: jax.Array) -> tuple[State, Any]:
        state = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self.program.arguments[1]
        )
        given = (self.wide, state._replace(pool=pool), jnp.asarray(words))
        placed = jax.tree.map(
            lambda x, leaf: jax.device_put(x, leaf.sharding),
            given,
            self.program.arguments,
        )
        return self.program(*placed)

    def alone(
        self, make: Any, variant: Any, like: Any, pool: jax.Array
    ) -> tuple[State, Any]:
        pages = self.model.empty_pages(B * S // C, C)
        run = jax.jit(make(self.model, variant, like))
        return run(self.params, State(pages, pool), jnp.asarray(packed(like)))


def choice(seat: int, position: int, at: int) -> Choice:
    warm = Sampling(temperature=1.0, top_k=20, seed=seat) if seat % 2 else Sampling()
    request = Request(id=str(seat), prompt=(1,), max_tokens=99, sampling=warm)
    return Choice(
        at=at, seat=seat, position=position, limit=S, prompt=1, request=request
    )


def test_decode_steps_say_on_a_mesh_what_they_say_on_one_device(tmp_path: Any) -> None:
    sides = Sides(tmp_path, serving.lower_paged_decode)
    seats = np.array([2, 0, 3, 1], np.int32)
    position = np.full((B,), C - 5, np.int32)  # steps lead into the second page
    draw = rows_of_choices(
        [choice(seat, C - 4, row) for row, seat in enumerate(seats.tolist())],
        *(DRAWN, B, ROOM),
    )
    like = (TABLE, DecodeRows(seats, position, draw), np.array([STEPS], np.int32))
    pool = jnp.full((B, S), -1, jnp.int32).at[:, C - 5].set(jnp.arange(B) * 7 + 3)
    state, want = sides.alone(decode_program, DRAWN, like, pool)
    other, found = sides.on_mesh(packed(like), pool)
    np.testing.assert_array_equal(found, want)
    assert (np.asarray(found)[:, :STEPS] >= 0).all()
    np.testing.assert_array_equal(other.pool, state.pool)
    assert other.cache.k.addressable_shards[0].data.shape[2] == 1
    keys = np.repeat(np.asarray(state.cache.k), 4, axis=2)
    np.testing.assert_allclose(other.cache.k, keys, rtol=1e-3, atol=1e-3)


def test_a_chunk_says_on_a_mesh_what_it_says_on_one_device(tmp_path: Any) -> None:
    sides = Sides(tmp_path, serving.lower_paged_chunk)
    token = np.random.default_rng(0).integers(0, 512, (1, CHUNK)).astype(np.int32)
    one = functools.partial(np.full, (1,), dtype=np.int32)
    rows = StepRows(token, one(1), one(C - 30), one(50))
    draw = rows_of_choices([choice(1, C + 20, 49)], FULL, 1, ROOM)
    pool = jnp.full((B, S), -1, jnp.int32)
    like = (TABLE, rows, draw)
    state, want = sides.alone(step_program, FULL, like, pool)
    other, found = sides.on_mesh(packed(like), pool)
    np.testing.assert_array_equal(found.token_R, want.token_R)
    np.testing.assert_allclose(found.logprob_R, want.logprob_R, rtol=1e-3)
    np.testing.assert_array_equal(other.pool, state.pool)
    keys = np.repeat(np.asarray(state.cache.k), 4, axis=2)
    np.testing.assert_allclose(other.cache.k, keys, rtol=1e-3, atol=1e-3)


def test_a_plan_that_splits_sequences_serves_no_pages(tmp_path: Any) -> None:
    path = tmp_path / "model.toml"
    path.write_text(MODEL, encoding="utf-8")
    config = config_of(path, "cpu:8", "plan.mesh.data=2", "plan.mesh.tensor=4")
    assert not serving.serves_pages(driver.plan(config))


def test_a_plan_to_train_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "model.toml"
    path.write_text(MODEL, encoding="utf-8")
    config = config_of(path, "cpu:2", "plan.phase=train", "plan.mesh.tensor=2")
    with pytest.raises(LowerError, match="this one needs plan.phase=decode"):
        serving.lower_paged_decode(driver.plan(config), config, mesh=None)


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


def for_tpu(folder: Any, lower: Any) -> tuple[Any, dict[str, Any], Plan]:
    pytest.importorskip("libtpu")
    path = folder / "model.toml"
    path.write_text(TPU_MODEL, encoding="utf-8")
    texts = ("train.compute_dtype=bfloat16", "serve.kv_dtype=int8", "batch.global=32")
    few = ("serve.weight_dtype=int8", "batch.seq_len=1024", "plan.mesh.tensor=4")
    config = config_of(path, "v5e:2x2", *texts, *few)
    chosen = serving.with_repeated_heads(driver.plan(config))
    mesh = lowering.device_mesh(chosen, lowering.compile_devices(chosen.topology))
    program = lower(chosen, config, mesh)
    found = lowering.compile_plan(chosen, lambda plan: (program, mesh), PROBE_EFFORT)
    return program, found, chosen


def test_a_tpu_decodes_over_pages_with_our_kernels_and_what_was_planned(
    tmp_path: Any,
) -> None:
    program, found, chosen = for_tpu(tmp_path, serving.lower_paged_decode)
    assert chosen.params.spec is not None and chosen.params.spec.num_kv_heads == 4
    for kernel in ("int8_matmul_int8_int8", "decode_attention", "write_tokens"):
        assert f"%{kernel}" in program.as_text(), kernel
    assert found["audited"] and found["unplanned_collectives"] == []


def test_a_chunk_on_a_tpu_changes_pages_in_place(tmp_path: Any) -> None:
    program, _, _ = for_tpu(tmp_path, serving.lower_paged_chunk)
    memory = program.memory()
    pages = 2 * 2 * 32 * 1024 * 128
    assert memory["alias_bytes"] >= pages
    assert memory["temp_bytes"] < pages / 2
