"""Compile a kernel's C++ for the CPU that it runs on, and hand it to XLA.

The source is compiled at first use with $CXX, c++, g++ or clang++, and kept in the
user's cache under a name that the text, the compiler and the CPU's instructions make.
LLMOS_CPU_KERNELS=0 turns all of them off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jaxlib.version

from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.places import cache_folder

_HERE = Path(__file__).parent
_HEADERS = tuple(_HERE.glob("*.h"))
"""What kernels share."""

_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-shared", "-pthread")
_THIS_CPU = (("-march=native",), ("-mcpu=native",), ())
"""Ways to ask for all of this CPU's instructions; a compiler knows at most one."""


def register(source: Path, targets: tuple[str, ...]) -> str | None:
    """Compile a source file if need be and register its handlers for the CPU.

    Args:
        source: a C++ file beside its Python.
        targets: XLA FFI handlers that it defines.

    Returns:
        Why it cannot be used, or None.

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
        library = ctypes.CDLL(str(_build(source)))
    except LowerError as problem:
        return str(problem)
    except OSError as problem:
        return f"the CPU kernel cannot be kept or loaded: {problem}"
    for target in targets:
        jax.ffi.register_ffi_target(
            target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu"
        )
    return None


def _build(source: Path) -> Path:
    """Return the compiled library, from the cache if it is there."""
    compiler = _compiler()
    flags, machine = _flags(compiler)
    texts = [path.read_text(encoding="utf-8") for path in (source, *sorted(_HEADERS))]
    parts = (*texts, *compiler, *flags, machine)
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
        include = (f"-I{jax.ffi.include_dir()}", f"-I{_HERE}")
        _run([*compiler, *flags, *include, str(source), "-o", str(fresh)])
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
