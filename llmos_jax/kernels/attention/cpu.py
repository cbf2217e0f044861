"""Attention on one CPU device, fused: one call forward, one backward, in C++.

B sequences, T query tokens, S key tokens, N query heads, K key/value heads,
H head size.

XLA:CPU writes scores and weights to memory and copies them between layouts; `cpu.cc`
keeps them in cache and rotates queries and keys while it packs them. It runs on XLA's
own threads (a custom call through `jax.ffi`) and gives the same bits with any number
of them. Float32 only, any score, no segments, no vmap. The partitioner cannot see
inside a custom call and would gather its inputs, so `api` picks it only where there is
one device.

The source is compiled at first use with $CXX, c++, g++ or clang++ for the CPU that it
runs on, and kept in the user's cache. LLMOS_CPU_KERNELS=0 turns it off.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.kernels.attention.reference import CONTEXT, PLAIN, Score, whole
from llmos_jax.kernels.target import Target, current_target
from llmos_jax.places import cache_folder

_SOURCE = Path(__file__).with_suffix(".cc")
_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
"""Ways to ask for all of this CPU's instructions; a compiler knows at most one."""

_TARGETS = ("llmos_attention_forward", "llmos_attention_backward")


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    position_BT: jax.Array | None,
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.attention`.

    Raises:
        LowerError: the kernel cannot be used here, and why.
    """
    _refuse(segment_BT)
    B, T = q_BTNH.shape[:2]
    if position_BT is None:
        position_BT = whole(B, T)
    no_angles = jnp.zeros((B, T, 0), jnp.float32)
    return _call(q_BTNH, k_BSKH, v_BSKH, position_BT, no_angles, no_angles, score)


def rotary_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    position_BT: jax.Array | None,
    angles: tuple[jax.Array, jax.Array],
    segment_BT: jax.Array | None = None,
    *,
    score: Score = PLAIN,
) -> jax.Array:
    """See `api.rotary_attention`.

    Raises:
        LowerError: the kernel cannot be used here, and why.
    """
    _refuse(segment_BT)
    if position_BT is None:
        position_BT = whole(*q_BTNH.shape[:2])
    return _call(q_BTNH, k_BTKH, v_BTKH, position_BT, *angles, score)


def suits(*arrays: jax.Array) -> bool:
    """Whether this kernel, if it can be built, is the one for these arrays.

    It is compiled for the CPU that is here, so that must be the target, too.
    """
    return (
        all(x.dtype == jnp.float32 for x in arrays)
        and current_target() == Target("cpu", 1)
        and jax.default_backend() == "cpu"
    )


@functools.cache
def unavailable() -> str | None:
    """Compile and register the kernel if need be; return why it cannot be, or None.

    Raises:
        ConfigError: LLMOS_CPU_KERNELS is neither 0 nor 1.
    """
    wanted = os.environ.get("LLMOS_CPU_KERNELS", "1")
    if wanted not in ("0", "1"):
        raise ConfigError(
            f"LLMOS_CPU_KERNELS = {wanted!r}; 0 turns the CPU kernels off, 1 on."
        )
    if wanted == "0":
        return "LLMOS_CPU_KERNELS=0"
    try:
        library = ctypes.CDLL(str(_build()))
    except LowerError as problem:
        return str(problem)
    except OSError as problem:
        return f"the CPU kernel cannot be kept or loaded: {problem}"
    for target in _TARGETS:
        jax.ffi.register_ffi_target(
            target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu"
        )
    return None


def _refuse(segment_BT: jax.Array | None) -> None:
    if segment_BT is not None:
        raise LowerError(
            "The CPU attention kernel knows no documents (segments). Use "
            'implementation="blocked".'
        )


def _build() -> Path:
    """Return the compiled library, from the cache if it is there."""
    compiler = _compiler()
    flags, machine = _flags(compiler)
    parts = (_SOURCE.read_text(encoding="utf-8"), *compiler, *flags, machine)
    name = hashlib.sha256(
        "\0".join((*parts, jaxlib.version.__version__)).encode()
    ).hexdigest()
    path = cache_folder() / "kernels" / f"{name[:24]}.so"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        # Two processes may both compile; each renames a whole file into place.
        fresh = Path(folder) / path.name
        include = f"-I{jax.ffi.include_dir()}"
        _run([*compiler, *flags, include, str(_SOURCE), "-o", str(fresh)])
        fresh.replace(path)
    return path


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        return chosen
    for name in ("c++", "g++", "clang++"):
        if shutil.which(name):
            return [name]
    raise LowerError("no C++ compiler (c++, g++, clang++ or $CXX) was found")


def _flags(compiler: list[str]) -> tuple[list[str], str]:
    """Return flags that this compiler takes, and what it predefines with them.

    The predefined macros name the compiler's version and every instruction set that it
    will use, so they tell apart machines that share a home folder.
    """
    for this_cpu in _THIS_CPU:
        flags = [*_FLAGS, *this_cpu]
        try:
            macros = _run([*compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull])
        except LowerError:
            if not this_cpu:
                raise
            continue
        return flags, macros
    raise AssertionError("the last of _THIS_CPU returns or raises")


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as problem:
        raise LowerError(f"{command[0]} cannot be run: {problem.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line]
        why = (lines or done.stderr.splitlines() or ["no message"])[0]
        raise LowerError(f"{command[0]} failed on the CPU kernel: {why}")
    return done.stdout


Arrays = tuple[jax.Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _call(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    score: Score,
) -> jax.Array:
    return _forward(q, k, v, position, cos, sin, score)[0]


def _attributes(score: Score, H: int) -> dict[str, np.number[Any]]:
    """The score as numbers for C++: what is not wanted is too large to matter."""
    window, softcap, _ = score
    return {
        "window": np.int64(np.iinfo(np.int32).max if window is None else window),
        "softcap": np.float32(np.inf if softcap is None else softcap),
        "scale": np.float32(score.factor(H)),
    }


def _forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    position: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    score: Score,
) -> tuple[jax.Array, Arrays]:
    reason = unavailable()
    if reason is not None:
        raise LowerError(f"the CPU attention kernel cannot be used: {reason}.")
    B, T, N, H = q.shape
    inputs = (q, k, v, position, cos, sin)
    kinds = (_like(q), jax.ShapeDtypeStruct((B, N, T), jnp.float32))
    out, statistics = (
        checkpoint_name(x, CONTEXT)
        for x in jax.ffi.ffi_call(_TARGETS[0], kinds)(*inputs, **_attributes(score, H))
    )
    return out, (*inputs, out, statistics)


def _backward(
    score: Score, saved: Arrays, dout: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None, None]:
    kinds = tuple(_like(x) for x in saved[:3])
    attributes = _attributes(score, dout.shape[-1])
    dq, dk, dv = jax.ffi.ffi_call(_TARGETS[1], kinds)(*saved, dout, **attributes)
    return dq, dk, dv, None, None, None


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


_call.defvjp(_forward, _backward)
