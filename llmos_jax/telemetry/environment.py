"""Describe this machine and its software as text, for reports and bug reports.

Versions come from package metadata: nothing heavy is imported, so `environment()` also
answers where jax is broken or missing.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

from llmos_jax.units import format_bytes

_PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain")


def environment() -> dict[str, str]:
    """Return name -> text, in the order to show it; what is not there is left out."""
    found = {
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "memory": _memory(),
    }
    found |= {name: _version(name) for name in ("llmos_jax", *_PACKAGES)}
    found["commit"] = _commit()
    return {name: text for name, text in found.items() if text}


def versions() -> dict[str, str]:
    """Versions of what decides and compiles a plan; what is not there is left out."""
    names = ("jax", "jaxlib", "libtpu", "llmos_jax")
    found = {name: _version(name) for name in names}
    return {name: text for name, text in found.items() if text}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join(models[0].split()) if models else platform.machine()


def _cores() -> str:
    everyone = os.cpu_count() or 1
    try:
        ours = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows do not have it
        ours = everyone
    return str(ours) if ours == everyone else f"{ours} of {everyone}"


def _memory() -> str:
    import psutil

    return format_bytes(psutil.virtual_memory().total)


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    """Commit of the checkout this package runs from, `+ changes` if it was edited."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    if not commit:
        return ""
    return f"{commit} + changes" if _git(root, "status", "--porcelain") else commit


def _git(root: Path, *command: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *command],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
