"""Say what devices are here, join the processes of a pod, and keep compiled programs.

The first room that touches JAX's backends. `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` join processes by hand; TPU pods, Slurm and
Open MPI are found by JAX itself.
"""

from __future__ import annotations

import hashlib
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.hardware import topology_of_devices
from llmos_jax.ir import Topology
from llmos_jax.places import cache_folder


def join_processes() -> None:
    """Initialise jax.distributed when the environment names more than one process.

    Raises:
        ConfigError: a coordinator is named without a valid process count and id.
        LowerError: the other processes could not be reached.
    """
    if jax.distributed.is_initialized() or not _many_processes():
        return
    count, index = (_integer(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    try:
        jax.distributed.initialize(num_processes=count, process_id=index)
    except (RuntimeError, ValueError) as problem:
        raise LowerError(
            f"the processes of this run could not be joined: {_first_line(problem)}. "
            "Check that every process has the same JAX_COORDINATOR_ADDRESS and "
            "JAX_NUM_PROCESSES, and its own JAX_PROCESS_ID."
        ) from None


def is_first_process() -> bool:
    """Whether this process speaks for the run: writes its files, shows its progress."""
    return jax.process_index() == 0


def is_only_process() -> bool:
    """Whether this process sees every shard of every array."""
    return jax.process_count() == 1


def local_topology() -> Topology:
    """Return the Topology of all devices JAX sees, over all processes."""
    try:
        devices = jax.devices()
    except RuntimeError as problem:
        raise LowerError(
            f"JAX found no device: {_first_line(problem)}. "
            "JAX_PLATFORMS=cpu runs on this machine's CPU."
        ) from None
    return topology_of_devices(
        devices[0].platform,
        devices[0].device_kind,
        len(devices),
        slices=_slices(devices),
        memory_bytes=_memory_bytes(devices[0]),
    )


def measure_matmul_flops_per_s(
    size: int = 1024, repeats: int = 3, dtype: str = "float32", device: Any = None
) -> float:
    """Measure matmul throughput of one device here, in FLOP/s: the best of a few.

    Takes about 0.1 s on two CPU cores. It is the denominator of MFU on a CPU, for which
    no data sheet gives a peak.

    Args:
        size: side of square matrices.
        repeats: runs, after one that compiles.
        dtype: of the matrices.
        device: a JAX device; None takes the first.
    """
    square = jax.device_put(jnp.ones((size, size), dtype), device)
    multiply = jax.jit(lambda a: a @ a)
    jax.block_until_ready(multiply(square))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(multiply(square))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def keep_compiled_programs() -> Path:
    """Turn JAX's persistent compile cache on, in a folder of this kind of machine.

    XLA:CPU programs hold instructions of the CPU they were compiled on, so a home
    folder shared by unlike machines needs one folder each.
    """
    here = hashlib.sha256(f"{platform.machine()} {_cpu_flags()}".encode()).hexdigest()
    folder = cache_folder() / "programs" / here[:12]
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return folder


_GPUS_A_HOST = 8
"""GPUs that NVLink joins in one host (hardware/chips.py: the 8-GPU boards)."""


def _slices(devices: list[jax.Device]) -> int:
    """Groups of devices that only DCN joins: TPU slices, or hosts of GPUs."""
    if devices[0].platform == "tpu":
        return len({getattr(device, "slice_index", 0) for device in devices})
    is_one_host = devices[0].platform == "cpu" or len(devices) <= _GPUS_A_HOST
    return 1 if is_one_host else -(-len(devices) // _GPUS_A_HOST)


def _many_processes() -> bool:
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return True
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_JOB_ID" in environment:
        return True
    if int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts or "MEGASCALE_COORDINATOR_ADDRESS" in environment


def _integer(name: str) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} = {text!r} is not a whole number.") from None


def _memory_bytes(device: jax.Device) -> float | None:
    if device.platform == "cpu":
        pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        return float(pages * page_bytes)
    statistics = device.memory_stats() or {}
    limit = statistics.get("bytes_limit")
    return None if limit is None else float(np.float64(limit))


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    kept = {line for line in lines if line.startswith(("flags", "Features"))}
    return " ".join(sorted(kept))


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0].rstrip(".")
