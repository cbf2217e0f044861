"""Turn a Topology's name into devices to compile for, none of which need be here.

libtpu brings the real TPU compiler to any x86-64 Linux: pip install 'llmos_jax[aot]'.
It talks to fd 2 from C++, about worker hostnames that a laptop lacks; `quiet` keeps
that from people.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import sys
import tempfile
import threading
from typing import Any

import jax

from llmos_jax.errors import LowerError
from llmos_jax.ir import Topology

_OPTIONS: dict[str, dict[str, str]] = {"v4": {"chip_config_name": "megacore"}}
"""Asked of libtpu beside the name: one device per v4 chip, as on Cloud."""

_CHIPS_A_HOST = 4
"""libtpu takes hosts to be 2x2x1, which a slice of fewer chips is not divisible by."""


def compile_devices(topology: Topology) -> list[Any]:
    """Return one device per JAX device of `topology`, fit for compiling only.

    Raises:
        LowerError: no compiler for this chip is here; with the way to get it.
    """
    chip = topology.chip
    if chip.vendor == "cpu":
        return _simulated(topology)
    if chip.vendor != "tpu":
        raise LowerError(
            f"{topology.name} cannot be compiled for from here: XLA compiles for "
            f"{chip.name} only where one is. The closed form needs none: "
            "--verify estimate."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise LowerError(
            f"compiling for {topology.name} needs libtpu, which brings the TPU "
            "compiler to any x86-64 Linux: pip install 'llmos_jax[aot]' (650 MB). "
            "--verify estimate works without it."
        )
    # Off Google Cloud there is no metadata server to ask, and asking takes minutes.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Compiling touches no chip, so others may compile, or use one, at the same time.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    shape = "x".join(map(str, topology.shape))
    options: dict[str, Any] = dict(_OPTIONS.get(chip.name, {}))
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    if math.prod(topology.shape) < _CHIPS_A_HOST:
        options["chips_per_host_bounds"] = [*topology.shape, 1, 1][:3]
    try:
        with quiet():
            described = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{chip.name}:{shape}", **options
            )
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError) as problem:
        line = (str(problem).splitlines() or [type(problem).__name__])[0]
        raise LowerError(
            f"libtpu knows no {topology.name}: {line[:300]} "
            "--verify estimate works without it."
        ) from None
    devices = list(described.devices)
    if len(devices) != topology.num_devices:
        raise LowerError(
            f"libtpu describes {topology.name} as {len(devices)} devices where "
            f"{topology.num_devices} were planned for. --verify estimate works."
        )
    return devices


def _simulated(topology: Topology) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < topology.num_devices:
        count = topology.num_devices
        raise LowerError(
            f"{topology.name} needs {count} simulated devices and this process has "
            f"{len(devices)}: XLA_FLAGS=--xla_force_host_platform_device_count={count}."
        )
    return list(devices[: topology.num_devices])


class _Silence:
    """fd 2 turned away while anyone asks for it; the descriptor belongs to all threads,
    so the first to ask turns it away and the last turns it back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._asking += 1
            if self._asking == 1:
                self._turn_away()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._asking -= 1
            if self._asking == 0:
                self._undo.close()

    def _turn_away(self) -> None:
        sys.stderr.flush()
        kept, spoken = os.dup(2), sys.stderr
        hidden = self._undo.enter_context(tempfile.TemporaryFile())
        self._undo.callback(os.close, kept)
        self._undo.callback(os.dup2, kept, 2)
        os.dup2(hidden.fileno(), 2)
        if spoken is sys.__stderr__:
            through = os.fdopen(os.dup(kept), "w", buffering=1)
            self._undo.callback(through.close)
            self._undo.callback(setattr, sys, "stderr", spoken)
            sys.stderr = through


_silence = _Silence()


def quiet() -> contextlib.AbstractContextManager[None]:
    """Keep what C++ writes to fd 2 out of sight; Python's stderr goes on as before."""
    return _silence
