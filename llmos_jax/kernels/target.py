"""Know what a kernel is being lowered for, which need not be what is here.

A program compiled for a TPU topology from a laptop must get the TPU's kernels. Whoever
lowers says so; without word, the target is this process's own devices.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class Target:
    """Where a program will run."""

    platform: str
    """cpu, tpu or gpu, as `jax.default_backend()` names them."""
    num_devices: int


_target: ContextVar[Target | None] = ContextVar("target", default=None)


def current_target() -> Target:
    """Return what is being lowered for; by default, the devices that are here."""
    return _target.get() or Target(jax.default_backend(), jax.device_count())


@contextlib.contextmanager
def lowered_for(target: Target) -> Iterator[None]:
    """Choose kernels for `target` while a model is traced."""
    token = _target.set(target)
    try:
        yield
    finally:
        _target.reset(token)
