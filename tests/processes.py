"""Several processes of one run on this machine: start them, wait for them."""

from __future__ import annotations

import json
import shutil
import socket

import small

PATIENCE_S = 240
"""Four processes compile on two cores."""

TRAIN = "import sys; from llmos_jax import train; sys.exit(train.main(sys.argv[1:]))"


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start_many(texts, count=2, *, devices=2, codes=None, **environment):
    """Start `count` processes of `train`, each with so many devices.

    `codes[index]` is the Python text that a process runs instead.
    """
    address = f"127.0.0.1:{free_port()}"
    return [
        small.start(
            ["-c", (codes or {}).get(index, TRAIN), *small.flags(texts), "--json"],
            devices=devices,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(count),
            JAX_PROCESS_ID=str(index),
            **environment,
        )
        for index in range(count)
    ]


def finish(processes):
    """Wait for all; return what each printed."""
    try:
        outputs = [process.communicate(timeout=PATIENCE_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    errors = "".join(stderr[-2000:] for _, stderr in outputs)
    assert codes == [0] * len(codes), errors
    return [json.loads(stdout) for stdout, _ in outputs]


def copy_until(source, target, step):
    """A run folder as it was when checkpoint `step` was its latest."""
    shutil.copytree(source, target)
    for folder in (target / "checkpoints").iterdir():
        if folder.name.isdigit() and int(folder.name) > step:
            shutil.rmtree(folder)
    (target / "report.json").unlink()
    return target
