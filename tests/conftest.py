"""Eight CPU devices, strict promotion, warnings as errors; a cache that tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("NPROC", "32")  # lowering/devices.py says why

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

from llmos_jax.config import load_model  # noqa: E402
from llmos_jax.ir import ModelSpec  # noqa: E402

FLOAT32_RELATIVE = 1e-5
"""Float32 sums of a few hundred terms in another order differ by about 1e-6."""


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for this worker's tests, away from the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LLMOS_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def tiny() -> ModelSpec:
    """Two layers, divisible by eight in every dimension that may be split."""
    return load_model("tiny")


@pytest.fixture
def key() -> jax.Array:
    """A random key."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60 kB of real English: Python's own documentation of its topics."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics.values())[:60_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file: `tiny` with a vocabulary of 512."""
    import small

    path = tmp_path_factory.mktemp("models") / "small.toml"
    path.write_text(small.MODEL, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, small_model: Path, text_file: Path
) -> Path:
    """The folder of a finished 20-step run over eight devices. Do not write to it."""
    import small

    folder = tmp_path_factory.mktemp("runs") / "straight"
    small.train(small.overrides(folder, small_model, text_file))
    return folder
