"""The host wing answers on a machine without jax: it imports with jax blocked."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WING = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["llmos"]["house"][
    "host_wing"
]

BLOCK = """
import importlib, sys

BLOCKED = {"jax", "jaxlib", "flax", "optax", "orbax", "grain"}

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"the host wing imports {name}")

sys.meta_path.insert(0, Block())
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as problem:
        sys.exit(f"{name}: {problem}")
"""


def modules_of(room: str) -> list[str]:
    """Dotted names of all modules in a room: a package, or one module."""
    place = ROOT.joinpath("llmos_jax", *room.split("."))
    files = (
        sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]
    )
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def import_without_jax(*modules: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK, *modules],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("room", WING)
def test_room_imports_without_jax(room):
    done = import_without_jax(*modules_of(room))
    assert done.returncode == 0, done.stderr


def test_the_block_holds():
    done = import_without_jax("json", "flax.nnx")
    assert done.returncode == 1
    assert "flax.nnx: the host wing imports flax" in done.stderr
