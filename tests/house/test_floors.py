"""Imports point down: every import in llmos_jax, by the floors in pyproject.toml."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmos_jax"


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """The tables of [tool.llmos]: room -> floor, and the pairs that are excused."""

    floors: dict[str, int]
    open_floors: frozenset[int]
    sideways: frozenset[tuple[str, ...]]
    sanctioned: frozenset[tuple[str, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import of `target`; `deferred` when it stands inside a function."""

    line: int
    target: str
    deferred: bool


def read_house() -> House:
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["llmos"]
    rules = tables["house"]
    return House(
        floors={
            room: int(floor)
            for floor, rooms in tables["floors"].items()
            for room in rooms
        },
        open_floors=frozenset(rules["open_floors"]),
        sideways=frozenset(map(tuple, rules["sideways"])),
        sanctioned=frozenset(map(tuple, rules["sanctioned"])),
    )


def room_of(file: Path) -> str:
    """The room of a file: planner for planner/cost.py, train for train.py."""
    first = file.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def find_imports(source: str, module: str) -> Iterator[Import]:
    """Every import of llmos_jax in `source`, the text of dotted `module`'s file."""

    def walk(node: ast.AST, deferred: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            for target in targets(child):
                yield Import(line=child.lineno, target=target, deferred=deferred)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, deferred or inside)

    def targets(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [name.name for name in node.names]
        if not isinstance(node, ast.ImportFrom):
            return []
        base = node.module or ""
        if node.level:
            parents = module.split(".")[: -node.level]
            base = ".".join([*parents, *filter(None, [base])])
        if base == "llmos_jax":
            return [f"llmos_jax.{name.name}" for name in node.names]
        return [base]

    for found in walk(ast.parse(source), deferred=False):
        if found.target.startswith("llmos_jax."):
            yield found


def judge(house: House, file: str, room: str, found: Import) -> str | None:
    """What is wrong with one import, as a message, or None."""
    target = found.target.split(".")[1]
    if target == room or target.startswith("__"):
        return None
    if target not in house.floors:
        return f"{file}:{found.line} imports llmos_jax.{target}, which is on no floor."
    here, there = house.floors[room], house.floors[target]
    edge = f"{file} (floor {here}) imports llmos_jax.{target} (floor {there})"
    if there < here or (room, target) in house.sideways:
        return None
    if there == here:
        if here in house.open_floors:
            return None
        return (
            f"{edge}, line {found.line}: neighbours meet in the floor above or in ir/."
        )
    if (room, target) in house.sanctioned:
        if found.deferred:
            return None
        return (
            f"{edge}, line {found.line}: import it inside the function that needs it."
        )
    return f"{edge}, line {found.line}: move the noun to ir/ or pass it in."


def judge_file(house: House, file: Path) -> list[str]:
    name = file.relative_to(PACKAGE).as_posix()
    room = room_of(file)
    module = ".".join(["llmos_jax", *file.relative_to(PACKAGE).with_suffix("").parts])
    imports = list(find_imports(file.read_text(encoding="utf-8"), module))
    if not room:
        return [
            f"{name} imports {each.target}: it must stay empty." for each in imports
        ]
    if room not in house.floors:
        return [f"{name}: the room {room} is on no floor in [tool.llmos.floors]."]
    verdicts = (judge(house, name, room, each) for each in imports)
    return [verdict for verdict in verdicts if verdict]


def test_imports_point_down():
    house = read_house()
    wrong = [
        text
        for file in sorted(PACKAGE.rglob("*.py"))
        for text in judge_file(house, file)
    ]
    assert not wrong, "\n" + "\n".join(wrong)


HOUSE = House(
    floors={"models": 3, "planner": 2, "kernels": 2, "rules": 1, "config": 1, "ir": 0}
    | {"errors": 0},
    open_floors=frozenset([0]),
    sideways=frozenset([("config", "rules")]),
    sanctioned=frozenset([("planner", "models")]),
)


@pytest.mark.parametrize(
    ("room", "source", "message"),
    [
        (
            "rules",
            "from llmos_jax.models import x",
            "move the noun to ir/ or pass it in",
        ),
        ("rules", "from llmos_jax import models", "move the noun to ir/ or pass it in"),
        (
            "rules",
            "import llmos_jax.models.layers",
            "(floor 1) imports llmos_jax.models",
        ),
        (
            "rules",
            "from ..models import x",
            "(floor 1) imports llmos_jax.models (floor 3)",
        ),
        (
            "rules",
            "def f():\n  from llmos_jax.models import x",
            "line 2: move the noun",
        ),
        ("planner", "from llmos_jax.models import x", "import it inside the function"),
        ("planner", "from llmos_jax.kernels import x", "neighbours meet in the floor"),
        (
            "rules",
            "from llmos_jax.config import x",
            "neighbours meet in the floor above",
        ),
        ("rules", "import llmos_jax.cellar", "which is on no floor"),
    ],
)
def test_a_wrong_import_is_named(room, source, message):
    found = list(find_imports(source, f"llmos_jax.{room}.cost"))
    verdict = judge(HOUSE, f"{room}/cost.py", room, found[0])
    assert verdict is not None
    assert message in verdict


@pytest.mark.parametrize(
    ("room", "source"),
    [
        ("models", "from llmos_jax.planner import x"),
        ("config", "from llmos_jax.rules import x"),
        ("ir", "from llmos_jax.errors import ConfigError"),
        ("planner", "def f():\n  from llmos_jax.models import x"),
        ("planner", "from llmos_jax.planner.memory import x"),
        ("planner", "from .memory import x"),
        ("planner", "from llmos_jax import __version__"),
    ],
)
def test_a_right_import_passes(room, source):
    found = list(find_imports(source, f"llmos_jax.{room}.cost"))
    assert [judge(HOUSE, f"{room}/cost.py", room, each) for each in found] == [None]
