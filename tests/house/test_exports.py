"""Each package's `__all__` is what the package exposes: no more, no less, each real."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(
    ".".join(file.parent.relative_to(ROOT).parts)
    for file in (ROOT / "llmos_jax").rglob("*/__init__.py")
)


def public_names(source: str) -> set[str]:
    """Names without an underscore that a module binds at its top level."""
    bound: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(name.asname or name.name).split(".")[0] for name in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Assign):
            bound |= {name.id for name in node.targets if isinstance(name, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            bound.add(node.target.id)
    return {name for name in bound if not name.startswith("_")}


def source_of(package: str) -> str:
    return ROOT.joinpath(*package.split("."), "__init__.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", PACKAGES)
def test_all_lists_every_public_name(package):
    listed = getattr(importlib.import_module(package), "__all__", [])
    missing = public_names(source_of(package)) - set(listed)
    assert not missing, f"{package}.__all__ lacks {sorted(missing)}"


@pytest.mark.parametrize("package", PACKAGES)
def test_all_names_exist_once(package):
    module = importlib.import_module(package)
    listed = list(getattr(module, "__all__", []))
    assert len(listed) == len(set(listed)), f"{package}.__all__ repeats a name"
    absent = [name for name in listed if not hasattr(module, name)]
    assert not absent, f"{package}.__all__ names {absent}, which do not exist"


def test_a_forgotten_name_is_found():
    source = "from __future__ import annotations\nfrom a import b\nimport c.d\n_e = 1"
    assert public_names(source) == {"b", "c"}
