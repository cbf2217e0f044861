"""Programs that are kept run when they come back, whatever JAX's own cache knows."""

from __future__ import annotations

import pytest
import small

MAKE = """
import pickle, sys
import jax, jax.numpy as jnp
from jax.experimental import serialize_executable
from llmos_jax.serving.programs import _compiled_here
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
def program(x):
    return jnp.sin(x) @ x + jnp.cumsum(x, 0)
x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
jax.jit(program).lower(x).compile()  # JAX's cache has it now
jax.clear_caches()
with _compiled_here():
    made = jax.jit(program).lower(x).compile()
assert jax.config.jax_enable_compilation_cache
with open(sys.argv[1] + "/kept", "wb") as file:
    pickle.dump(serialize_executable.serialize(made), file)
"""
RUN = """
import pickle, sys
import jax.numpy as jnp
from jax.experimental import serialize_executable
with open(sys.argv[1] + "/kept", "rb") as file:
    program = serialize_executable.deserialize_and_load(*pickle.load(file))
print(float(program(jnp.ones((64, 64)))[0, 0]))
"""


def test_what_was_compiled_beside_jaxs_cache_runs_in_the_next_process(tmp_path):
    for code in (MAKE, RUN):
        process = small.start(["-c", code, str(tmp_path)], devices=1)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    assert float(out) == pytest.approx(64 * 0.841471 + 1, rel=1e-3)
    assert list(tmp_path.glob("*-cache")), "JAX's cache was not used at all"
