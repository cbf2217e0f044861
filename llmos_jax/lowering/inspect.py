"""Look at this machine as a runtime would: what is here, what works, what is missing.

Each check is {"name", "status" (ok | warn | fail), "detail", "remedy"}.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import LlmosError
from llmos_jax.lowering.devices import local_topology, measure_matmul_flops_per_s
from llmos_jax.places import cache_folder
from llmos_jax.units import GIB, format_bytes, format_si

Check = dict[str, str]
_JIT_TOLERANCE = 1e-5
"""Relative; float32 sums of 256 terms in another order differ by about 1e-6."""


def inspect() -> list[Check]:
    """Run every check; none of them raises."""
    return [_run(check) for check in _CHECKS]


def _run(check: Callable[[], Check]) -> Check:
    try:
        return check()
    except LlmosError as problem:
        name = check.__name__.strip("_").replace("_", " ")
        return _result(name, "fail", str(problem))


def _result(name: str, status: str, detail: str, remedy: str = "") -> Check:
    return {"name": name, "status": status, "detail": detail, "remedy": remedy}


def _python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return _result("python", "ok", f"{version}, jax {jax.__version__}")


def _devices() -> Check:
    topology = local_topology()
    per_device = format_bytes(topology.hbm_bytes_per_device)
    kind = jax.devices()[0].device_kind
    detail = f"{topology.name} ({kind}), {per_device} each"
    return _result("devices", "ok", detail)


def _compiled_results() -> Check:
    """Jitted float32 results against the same operations one by one."""
    keys = jax.random.split(jax.random.key(0), 2)
    a, b = (jax.random.normal(key, (256, 256), jnp.float32) for key in keys)

    def layer(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.nn.softmax(a @ b / 16, axis=-1) @ jax.nn.silu(b)

    with jax.disable_jit():
        expected = np.asarray(layer(a, b))
    error = float(np.max(np.abs(np.asarray(jax.jit(layer)(a, b)) - expected)))
    error /= float(np.max(np.abs(expected)))
    detail = f"jit against op by op: largest relative difference {error:.1e}"
    if error < _JIT_TOLERANCE:
        return _result("compiled results", "ok", detail)
    remedy = "Install another jaxlib; this one computes wrong results here."
    return _result("compiled results", "fail", detail, remedy)


def _matmul_rate() -> Check:
    rate = format_si(measure_matmul_flops_per_s(), "FLOP/s")
    return _result("matmul rate", "ok", f"{rate}, float32, one device")


def _memory() -> Check:
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    detail = f"{format_bytes(available)} of host memory free"
    if available > 2 * GIB:
        return _result("memory", "ok", detail)
    return _result("memory", "warn", detail, "The quickstart wants about 2 GiB.")


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    detail = f"{format_bytes(free)} free in the working folder"
    if free > 2 * GIB:
        return _result("disk", "ok", detail)
    return _result("disk", "warn", detail, "Checkpoints need room; set run.dir.")


def _cache() -> Check:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as problem:
        remedy = "Set LLMOS_CACHE to a folder that can be written."
        return _result("cache", "fail", f"{folder}: {problem.strerror}", remedy)
    return _result("cache", "ok", f"{folder} can be written")


def _compiler() -> Check:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found:
        return _result("C++ compiler", "ok", found)
    remedy = "apt-get install g++ (for the CPU kernels; everything works without)"
    return _result("C++ compiler", "warn", "none found", remedy)


def _tpu_compiler() -> Check:
    if importlib.util.find_spec("libtpu"):
        return _result("TPU compiler", "ok", "libtpu is installed")
    remedy = "pip install libtpu (any x86-64 Linux): plans can then be proved"
    return _result("TPU compiler", "warn", "libtpu is not installed", remedy)


_CHECKS = (
    _python,
    _devices,
    _compiled_results,
    _matmul_rate,
    _memory,
    _disk,
    _cache,
    _compiler,
    _tpu_compiler,
)
