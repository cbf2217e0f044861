"""Laws of windows, soft-capped scores and other scales, over every implementation."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from laws import (
    angles,
    assert_near,
    available,
    definition,
    documents,
    inputs,
    last_positions,
    results,
    square,
)

from llmos_jax.errors import LowerError
from llmos_jax.kernels.attention import (
    IMPLEMENTATIONS,
    PLAIN,
    Score,
    attention,
    blocked,
    context_attention,
    device_order,
    reference,
    rotary_attention,
    rotate,
    splash,
)
from llmos_jax.kernels.attention.api import _fastest
from llmos_jax.kernels.attention.context import PARTS
from llmos_jax.kernels.target import Target, lowered_for

SCORES = {
    "window": Score(window=37),
    "window of one": Score(window=1),
    "window beyond": Score(window=1000),
    "softcap": Score(softcap=1.5),
    "scale": Score(scale=0.4),
    "all": Score(window=130, softcap=1.5, scale=0.4),
}
"""Products of the tests' heads have a deviation of 4: scaled ones reach the softcap."""

BFLOAT16_RELATIVE = 2e-2
"""Of the largest entry: weights and output are rounded to 8 bits, two to four times."""

WHOLE = (1, 300, 4, 2, 16)
"""B, T, N, K, H: three blocks of splash and of small `blocked`, five panels of cpu.cc,
with padding."""

assert_close = functools.partial(assert_near, absolute=5e-6)
"""Besides: what equal products of rows leave where one key is seen, some thousand times
over, and gradients are 0. The others are about 5."""

slow = pytest.mark.slow
each_score = pytest.mark.parametrize("score", SCORES.values(), ids=SCORES)
some_scores = pytest.mark.parametrize(
    "score",
    [
        pytest.param(score, id=name, marks=() if name == "all" else slow)
        for name, score in SCORES.items()
    ],
)
"""Each takes a compilation or two, of seconds where a kernel is interpreted."""


@pytest.fixture(params=sorted(IMPLEMENTATIONS.keys() - {"pallas_gpu", "reference"}))
def implementation(request: pytest.FixtureRequest) -> str:
    """Each that takes every score, but for the oracle."""
    return available(request.param)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that windows of `blocked` begin and end in other blocks."""
    monkeypatch.setattr(blocked, "BLOCK", 128)


@each_score
def test_the_reference_scores_as_defined(score: Score, key: jax.Array) -> None:
    shape = (2, 50, 90, 4, 2, 8)
    q, k, v, _ = inputs(shape, key)
    position = last_positions(shape)
    attend = jax.jit(functools.partial(reference.attention, score=score))
    got = attend(q, k, v, position)
    expected = definition(q, k, v, position, score=score)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@each_score
def test_the_reference_scores_documents_as_defined(
    score: Score, key: jax.Array
) -> None:
    shape = (2, 90, 90, 4, 2, 8)
    q, k, v, _ = inputs(shape, key)
    segment = documents((2, 90))
    attend = jax.jit(functools.partial(reference.attention, score=score))
    got = attend(q, k, v, None, jnp.asarray(segment))
    expected = definition(q, k, v, last_positions(shape), segment, score)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


@some_scores
def test_output_and_gradients_of_whole_sequences_equal_the_reference(
    implementation: str, score: Score, key: jax.Array
) -> None:
    arrays = inputs(square(WHOLE), key)
    got = results(
        lambda q, k, v: attention(
            q, k, v, None, score=score, implementation=implementation
        ),
        *arrays,
    )
    expected = results(
        lambda q, k, v: reference.attention(q, k, v, None, score=score), *arrays
    )
    assert_close(got, expected)


@pytest.mark.parametrize(
    ("shape", "where"),
    [
        ((2, 150, 333, 6, 2, 20), "anywhere"),
        pytest.param((2, 150, 333, 6, 2, 20), "last", marks=slow),
        pytest.param((1, 1, 400, 4, 1, 16), "last", marks=slow),
    ],
)
@some_scores
def test_output_and_gradients_at_positions_equal_the_reference(
    score: Score, shape: tuple[int, ...], where: str, key: jax.Array
) -> None:
    position = last_positions(shape)
    if where == "anywhere":
        position = jax.random.randint(key, shape[:2], 0, shape[2])
    arrays = inputs(shape, key)
    expected = results(
        lambda q, k, v: reference.attention(q, k, v, position, score=score), *arrays
    )
    for name in ("blocked", available("cpu")):
        attend = functools.partial(attention, score=score, implementation=name)
        got = results(lambda q, k, v, attend=attend: attend(q, k, v, position), *arrays)
        assert_close(got, expected)


@pytest.mark.parametrize(
    "name", ["all", *(pytest.param(name, marks=slow) for name in ("window", "softcap"))]
)
@pytest.mark.parametrize("segmented", ["splash", pytest.param("blocked", marks=slow)])
def test_output_and_gradients_of_rotated_documents_equal_the_reference(
    segmented: str, name: str, key: jax.Array
) -> None:
    B, T, _, _, H = WHOLE
    score, segment = SCORES[name], jnp.asarray(documents((B, T)))
    arrays, cos_sin = inputs(square(WHOLE), key), angles(B, T, H, key)
    got = results(
        lambda q, k, v: rotary_attention(
            q, k, v, None, cos_sin, segment, score=score, implementation=segmented
        ),
        *arrays,
    )
    expected = results(
        lambda q, k, v: reference.attention(
            rotate(q, cos_sin), rotate(k, cos_sin), v, None, segment, score=score
        ),
        *arrays,
    )
    assert_close(got, expected)


def test_the_cpu_kernel_rotates_what_a_window_shows(key: jax.Array) -> None:
    B, T, _, _, H = WHOLE
    arrays, cos_sin = inputs(square(WHOLE), key), angles(B, T, H, key)
    # No query sees the first hundred keys.
    position = jnp.maximum(last_positions(square(WHOLE)), 229)
    got = results(
        lambda q, k, v: rotary_attention(
            *(q, k, v, position, cos_sin),
            score=SCORES["all"],
            implementation=available("cpu"),
        ),
        *arrays,
    )
    expected = results(
        lambda q, k, v: reference.attention(
            rotate(q, cos_sin), rotate(k, cos_sin), v, position, score=SCORES["all"]
        ),
        *arrays,
    )
    assert_close(got, expected)
    assert not np.any(got[2][:, :100]) and np.all(np.any(got[2][:, 100:], axis=-1))


@pytest.mark.parametrize("name", ["blocked", "cpu", "reference"])
def test_a_window_is_cut_where_the_query_stands_not_where_keys_end(
    name: str, key: jax.Array
) -> None:
    q, k, v, _ = inputs((1, 1, 20, 2, 1, 8), key)
    attend = functools.partial(attention, implementation=available(name))
    # Of keys 18 to 25 there are two.
    windowed = jax.jit(functools.partial(attend, score=Score(window=8)))
    got = windowed(q, k, v, jnp.array([[25]]))
    expected = jax.jit(attend)(q, k[:, 18:], v[:, 18:], jnp.array([[1]]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_what_a_window_hides_may_hold_anything(
    implementation: str, key: jax.Array
) -> None:
    q, k, v, _ = inputs(square(WHOLE), key)
    attend = functools.partial(
        attention, score=Score(window=60), implementation=implementation
    )
    attend = jax.jit(attend)
    clean = attend(q, k, v, None)
    dirty = attend(q, k.at[:, :140].set(1e30), v.at[:, :140].set(1e30), None)
    np.testing.assert_array_equal(clean[:, 199:], dirty[:, 199:])
    assert np.any(clean[:, 198] != dirty[:, 198])


def test_blocks_wholly_before_the_window_are_not_read(key: jax.Array) -> None:
    q, k, v, dout = inputs((1, 8, 640, 2, 1, 16), key)
    position = jnp.arange(600, 608)[None, :]
    attend = functools.partial(
        attention, score=Score(window=80), implementation="blocked"
    )
    # Keys 521 on are seen, of the block from 512 on.
    poison = [x.at[:, :512].set(jnp.nan) for x in (k, v)]
    out, dq, dk, _ = results(
        lambda q, k, v: attend(q, k, v, position), q, *poison, dout
    )
    assert bool(jnp.all(jnp.isfinite(out)) & jnp.all(jnp.isfinite(dq)))
    assert not np.any(dk[:, :521]) and np.all(np.any(dk[:, 521:607], axis=-1))


@slow
@pytest.mark.parametrize("name", ["blocked", "splash"])
def test_bfloat16_is_as_near_as_bfloat16_can_be(name: str, key: jax.Array) -> None:
    half = [x.astype(jnp.bfloat16) for x in inputs((1, 260, 260, 4, 2, 64), key)]
    single = [x.astype(jnp.float32) for x in half]
    score = Score(window=100, softcap=2.0, scale=0.1)
    got = results(
        lambda q, k, v: attention(q, k, v, None, score=score, implementation=name),
        *half,
    )
    expected = results(
        lambda q, k, v: reference.attention(q, k, v, None, score=score), *single
    )
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert_close(got, expected, BFLOAT16_RELATIVE)


@slow
@pytest.mark.parametrize("size", [1e-4, 10.0, 1e6])
def test_any_logits_may_be_capped(
    implementation: str, size: float, key: jax.Array
) -> None:
    q, k, v, dout = inputs(square(WHOLE), key)
    score = Score(window=50, softcap=30.0)
    got, expected = (
        results(
            lambda q, k, v, name=name: attention(
                q, k, v, None, score=score, implementation=name
            ),
            *(size * q, k, v, dout),
        )
        for name in (implementation, "reference")
    )
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in got)
    if size < 1e6:  # there, a rounding of a product is as large as a small score
        assert_close(got, expected)


@pytest.mark.parametrize(
    "name", ["cpu", "reference", pytest.param("blocked", marks=slow)]
)
def test_compiled_and_step_by_step_agree(name: str, key: jax.Array) -> None:
    q, k, v, dout = inputs(square(WHOLE), key)
    attend = functools.partial(
        attention, score=SCORES["all"], implementation=available(name)
    )
    out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, None), q, k, v)
    compiled = results(lambda q, k, v: attend(q, k, v, None), q, k, v, dout)
    assert_close([out, *pull(dout)], compiled)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_window_of_all_tokens_changes_no_bit(name: str, key: jax.Array) -> None:
    q, k, v, _ = inputs(square(WHOLE), key)
    attend = functools.partial(attention, implementation=available(name))
    wide = jax.jit(functools.partial(attend, score=Score(window=300)))
    np.testing.assert_array_equal(wide(q, k, v, None), jax.jit(attend)(q, k, v, None))


def test_the_gpu_kernel_takes_another_scale(key: jax.Array) -> None:
    arrays, score = inputs(square(WHOLE), key), SCORES["scale"]
    got, expected = (
        results(
            lambda q, k, v, name=name: attention(
                q, k, v, None, score=score, implementation=name
            ),
            *arrays,
        )
        for name in ("pallas_gpu", "reference")
    )
    assert_close(got, expected)


@pytest.mark.parametrize("name", ["window", "softcap", "all"])
def test_the_gpu_kernel_refuses_what_it_does_not_know(
    name: str, key: jax.Array
) -> None:
    q, k, v, _ = inputs(square(WHOLE), key)
    with pytest.raises(LowerError, match='Use implementation="blocked"'):
        attention(q, k, v, None, score=SCORES[name], implementation="pallas_gpu")


@pytest.mark.parametrize(
    ("platform", "score", "expected"),
    [
        ("tpu", SCORES["all"], "splash"),
        ("gpu", SCORES["scale"], "pallas_gpu"),
        ("gpu", SCORES["window"], "blocked"),
        ("gpu", SCORES["softcap"], "blocked"),
        ("cpu", SCORES["all"], "cpu"),
    ],
)
def test_the_score_decides_with_the_target(
    platform: str, score: Score, expected: str
) -> None:
    available(expected)
    x = jax.ShapeDtypeStruct((1, 8192, 8, 64), jnp.float32)
    with lowered_for(Target(platform, 1)):
        assert _fastest(x, x, x, None, None, score) == expected


@pytest.mark.parametrize("window", [1, 2, 100, 128, 129, 130, 256, 257, 258, 384, 500])
def test_splash_windows_equal_those_the_library_makes(window: int) -> None:
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    mask = library.LocalMask((512, 512), (window - 1, 0), 0)
    made = library.make_splash_mha(
        library.MultiHeadMask([mask] * 2),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=library.splash_attention_kernel.BlockSizes(*[128] * 8),
    )
    ours = splash._kernel(512, 128, Score(window=window))
    for name in ("fwd_mask_info", "dq_mask_info", "dkv_mask_info"):
        jax.tree.map(
            np.testing.assert_array_equal, getattr(ours, name), getattr(made, name)
        )


def test_splash_visits_few_blocks_of_a_long_sequence() -> None:
    kernel = splash._kernel(131_072, 1024, Score(window=4096))
    # A block of queries meets its own keys and the 4096 before its last but one.
    assert kernel.fwd_mask_info.block_mask.shape == (1, 128, 5)
    assert kernel.dkv_mask_info.block_mask.shape == (1, 5, 128)


@pytest.mark.parametrize("implementation", PARTS)
def test_a_part_is_scored_as_the_whole(implementation: str, key: jax.Array) -> None:
    score = Score(softcap=1.5, scale=0.4)
    q, k, v, dout = inputs(square(WHOLE), key)
    expected = results(
        lambda q, k, v: reference.attention(q, k, v, None, score=score), q, k, v, dout
    )
    part = PARTS[implementation]

    @jax.jit
    def there_and_back(*arrays: jax.Array) -> list[jax.Array]:
        *qkv, dout = arrays
        out, lse = part.forward_part(*qkv, None, causal=True, score=score)
        mean = jnp.einsum("BTNH,BTNH->BNT", out, dout)
        given = (*arrays, lse, mean, None)
        return [out, *part.backward_part(*given, causal=True, score=score)]

    assert_close(there_and_back(q, k, v, dout), expected)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["ring", "gather"])
def test_split_sequences_are_scored_as_on_one_device(
    exchange: str, key: jax.Array
) -> None:
    score, order = Score(softcap=1.5, scale=0.4), device_order(32, 2)
    arrays = inputs((2, 32, 32, 4, 2, 16), key)
    spec = PartitionSpec(None, "context")
    split = jax.shard_map(
        lambda q, k, v: context_attention(
            q, k, v, None, ("context",), exchange=exchange, score=score
        ),
        mesh=Mesh(np.array(jax.devices()[:2]), ("context",)),
        in_specs=(spec,) * 3,
        out_specs=spec,
        check_vma=False,
    )
    got = results(split, *(x[:, order] for x in arrays))
    expected = results(
        lambda q, k, v: reference.attention(q, k, v, None, score=score), *arrays
    )
    assert_close(got, [x[:, order] for x in expected])


def test_split_sequences_refuse_a_window(key: jax.Array) -> None:
    q, k, v, _ = inputs((1, 8, 8, 2, 1, 4), key)
    with pytest.raises(LowerError, match="window of 4. Set plan.mesh.context=1"):
        context_attention(
            q, k, v, None, ("context",), exchange="ring", score=Score(window=4)
        )


def test_a_plain_score_is_what_comes_without_one(key: jax.Array) -> None:
    assert Score(None, None, None) == PLAIN
    assert PLAIN.factor(64) == 0.125
    assert Score(scale=0.3).factor(64) == 0.3
