"""The engine over many devices says what it says on one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from engines import asked, engine_of, request_of

from llmos_jax import driver, resolve, service
from llmos_jax.scheduling import Sampling

WARM = Sampling(temperature=0.8, seed=1)
REQUESTS = [
    request_of(
        index,
        np.arange(20 * index + 1) * 11 % 256,
        10,
        sampling=WARM if index else Sampling(),
    )
    for index in range(3)
]


def test_an_engine_says_on_a_mesh_what_it_says_on_one_device(small_run: Path) -> None:
    """Eight devices share every layer, and two each keep a key/value head."""
    sizes = ("serve.seats=2", "serve.step_tokens=16", "serve.cache_gib=0.01")
    opened, config = resolve.open_with_config(
        str(small_run), [*sizes, "plan.mesh.tensor=8"]
    )
    with engine_of(opened.skeleton, opened.params(dtype="float32")) as alone:
        wanted = [one.tokens for one in asked(alone, REQUESTS)]
    engine = service.make_ready(opened, config, driver.plan).engine()
    try:
        engine.wait_until_ready()
        got = [one.tokens for one in asked(engine, REQUESTS)]
        state = engine._runner._state
        assert len(state.cache.k.addressable_shards) == 8
        assert state.cache.k.addressable_shards[0].data.shape[2] == 1
        assert engine.state().unplanned_compiles == 0
    finally:
        engine.stop()
    assert got == wanted


def test_a_bundle_made_for_one_device_is_served_on_a_mesh(
    small_run: Path, tmp_path: Path
) -> None:
    """It is planned anew; its page says the rest."""
    sizes = ["serve.seats=2", "serve.step_tokens=16", "serve.cache_gib=0.01"]
    out = str(tmp_path / "bundle")
    one = [*sizes, "topology=cpu:1", "export.programs=false"]
    driver.export(str(small_run), out, one)
    opened, config = resolve.open_with_config(out, ["plan.mesh.tensor=8"])
    assert config.serve.seats == 2 and config.topology is None
    with engine_of(opened.skeleton, opened.params(dtype="float32")) as alone:
        wanted = [answer.tokens for answer in asked(alone, REQUESTS)]
    engine = service.make_ready(opened, config, driver.plan).engine()
    try:
        engine.wait_until_ready()
        assert [answer.tokens for answer in asked(engine, REQUESTS)] == wanted
        assert len(engine._runner._state.cache.k.addressable_shards) == 8
    finally:
        engine.stop()
