"""Say what devices are here, join the processes of a pod, and keep compiled programs.

The first room that touches JAX's backends. `JAX_COORDINATOR_ADDRESS`,
`JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` join processes by hand; TPU pods, Slurm and
Open MPI are found by JAX itself. Joined processes watch one another (peers.py).
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jax._src import distributed

from llmos_jax.errors import ConfigError, LowerError
from llmos_jax.hardware import topology_of_devices
from llmos_jax.ir import Topology
from llmos_jax.lowering.aborts import failures_told_to
from llmos_jax.lowering.peers import leave_without_goodbye, lost_service, watch_peers
from llmos_jax.places import cache_folder

THREADS_A_DEVICE = 4
"""For simulated devices. XLA:CPU runs independent collectives side by side, and each
blocks a thread until its whole group has come: a pipeline of 8 devices on 8 threads
stood still for good (jax 0.10.2), and not on 32."""


def _room_for_simulated_devices() -> None:
    """Ask XLA for threads, where XLA_FLAGS simulates devices: it reads NPROC as the
    number of processors when its CPU backend starts."""
    flags = os.environ.get("XLA_FLAGS", "")
    found = re.search(r"xla_force_host_platform_device_count=(\d+)", flags)
    if found and int(found[1]) > 1:
        os.environ.setdefault("NPROC", str(THREADS_A_DEVICE * int(found[1])))


_room_for_simulated_devices()


def join_processes(patience_s: int = 300) -> None:
    """Initialise jax.distributed when the environment names more than one process.

    From then on the processes watch one another: one that is silent for
    `LLMOS_SILENCE_S` seconds (30 unless set) stops them all.

    Args:
        patience_s: given to JAX as the time to wait for the others (its default); it
            gave up after 9 s when told 4 (jax 0.10.2 and 0.12, on a CPU).

    Raises:
        ConfigError: a coordinator is named without a valid process count and id.
        LowerError: the other processes could not be reached.
    """
    if jax.distributed.is_initialized() or not _many_processes():
        return
    count, index = (_integer(name) for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"))
    silence_s = _integer("LLMOS_SILENCE_S", least=1) or _SILENCE_S
    with failures_told_to(lost_service), _counted() as joined:
        try:
            jax.distributed.initialize(
                num_processes=count,
                process_id=index,
                initialization_timeout=patience_s,
                heartbeat_timeout_seconds=2 * silence_s,
            )
        except (RuntimeError, ValueError) as problem:
            leave_without_goodbye()
            raise LowerError(_why_not_joined(problem, joined)) from None
    state = distributed.global_state
    assert state.client is not None
    watch_peers(state.client, state.process_id, state.num_processes, silence_s)


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
    folder = cache_folder() / "programs" / cpu_name()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    return folder


def cpu_name() -> str:
    """A word for CPUs with these instructions: what compiled code depends on."""
    here = hashlib.sha256(f"{platform.machine()} {_cpu_flags()}".encode()).hexdigest()
    return here[:12]


_GPUS_A_HOST = 8
"""GPUs that NVLink joins in one host (hardware/chips.py: the 8-GPU boards)."""


def _slices(devices: list[jax.Device]) -> int:
    """Groups of devices that only DCN joins: TPU slices, or hosts of GPUs."""
    if devices[0].platform == "tpu":
        return len({getattr(device, "slice_index", 0) for device in devices})
    is_one_host = devices[0].platform == "cpu" or len(devices) <= _GPUS_A_HOST
    return 1 if is_one_host else -(-len(devices) // _GPUS_A_HOST)


_SILENCE_S = 30
"""A judgement: JAX's own 100 s cost a pod more than a stalled host is worth; Python
threads that hold the interpreter for half a minute are not known here."""


@contextmanager
def _counted() -> Iterator[set[tuple[Any, ...]]]:
    """Meanwhile, collect who connects to the coordinator, if it is in this process."""
    seen: set[tuple[Any, ...]] = set()
    is_over = threading.Event()

    def count() -> None:
        while not is_over.wait(0.2):
            address = distributed.global_state.coordinator_address
            if distributed.global_state.service is None or address is None:
                continue
            port = int(address.rsplit(":", 1)[1])
            with suppress(psutil.Error):
                for found in psutil.Process().net_connections("tcp"):
                    if found.laddr.port == port and found.status == "ESTABLISHED":
                        seen.add(tuple(found.raddr))

    thread = threading.Thread(target=count, daemon=True, name="joiners")
    thread.start()
    try:
        yield seen
    finally:
        is_over.set()
        thread.join()


def _why_not_joined(problem: Exception, joined: set[tuple[Any, ...]]) -> str:
    state = distributed.global_state
    check = (
        "Check that every process has the same JAX_COORDINATOR_ADDRESS and "
        "JAX_NUM_PROCESSES, and its own JAX_PROCESS_ID."
    )
    if state.client is None:
        return (
            "the processes of this run could not be joined: "
            f"{_first_line(problem)}. {check}"
        )
    if state.service is not None:
        return f"only {len(joined)} of {state.num_processes} processes joined. {check}"
    where = state.coordinator_address
    if _answers(where):
        return (
            f"process 0 at {where} still waits for others of the "
            f"{state.num_processes} processes; its error says how many came. {check}"
        )
    return (
        f"process {state.process_id} of {state.num_processes} (counted from 0) found "
        f"no process 0 at {where}. {check}"
    )


def _answers(address: str | None) -> bool:
    if address is None:
        return False
    host, port = address.rsplit(":", 1)
    with suppress(OSError), socket.create_connection((host.strip("[]"), int(port)), 5):
        return True
    return False


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


def _integer(name: str, least: int = 0) -> int | None:
    text = os.environ.get(name)
    if text is None:
        return None
    if not text.isdecimal() or int(text) < least:
        wanted = f"a whole number, {least} or more"
        raise ConfigError(f"{name} = {text!r} is not {wanted}.")
    return int(text)


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
