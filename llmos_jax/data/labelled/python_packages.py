"""Turn the Python that is running into a task: which package is a piece of text from?

Ten packages of the standard library that are in every CPython 3.11 to 3.13, Debian's
too. A piece is a docstring, or up to a few hundred characters of a function's source.
What would give the answer away is taken out: imports, and the names of the ten as
words. A file is on one side of the split with all that it holds, or, where it is most
of its package, each of its classes and functions is; a piece whose words stand in two
such groups is left out.
"""

from __future__ import annotations

import ast
import hashlib
import re
import textwrap
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from llmos_jax.data.python_docs import definitions, modules, plain, source_of
from llmos_jax.errors import DataError

PYTHON_PACKAGES = "python-packages"

Side = Literal["train", "validation", "test"]
_HELD_OUT_SIDES: tuple[Side, ...] = ("test", "validation")

PACKAGES = (
    "asyncio",
    "concurrent",
    "email",
    "http",
    "importlib",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
"""Those with the most text, of those that no distribution splits off (as Debian does
with tkinter, idlelib, lib2to3 and distutils) and that are no tables (encodings)."""

LONGEST = 400
"""Characters of a piece, a judgement: about 100 tokens."""
_SHORTEST = 40
"""Characters, a judgement: less says nothing of its package."""
_HELD_OUT = 0.15
"""Share of a package's pieces for validation, and again for test: a judgement."""
_ROOM = 1.5
"""How far over its share a side may come for the sake of a whole file: a judgement."""

_NAMES = re.compile(
    rf"(?<![A-Za-z0-9])({'|'.join(PACKAGES)})(?![A-Za-z0-9])", re.IGNORECASE
)
_IMPORT = re.compile(r"(?m)^[ \t]*(>>> )?(import|from) [^\n]*\n?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of text, its package, and the side that its group is on."""

    text: str
    label: str
    place: str
    group: str
    side: Side


@cache
def pieces() -> tuple[Piece, ...]:
    """Return all pieces, sorted by file and line.

    Raises:
        DataError: this Python was installed without one of the packages.
    """
    found = [
        piece
        for module, path in modules()
        if module.partition(".")[0] in PACKAGES
        for piece in _pieces_of(module, source_of(path))
    ]
    missing = sorted(set(PACKAGES) - {piece.label for piece in found})
    if missing:
        raise DataError(
            f"python-packages: this Python has no source of {', '.join(missing)}. "
            "Install the full library (Debian: `apt install libpython3-stdlib`), or "
            "name your own rows in data.train."
        )
    grouped = _without_repeats(_grouped(found))
    sides = _sides(grouped)
    return tuple(replace(piece, side=sides[piece.group]) for piece in grouped)


def _pieces_of(module: str, source: str) -> Iterator[Piece]:
    """Yield a module's docstrings and functions, grouped by what they stand in."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # the library's own, not ours
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return
    lines = source.splitlines()
    for top, node in _nodes(tree, ""):
        line = getattr(node, "lineno", 1)
        doc = ast.get_docstring(node)
        texts = [plain(doc)] if doc else []
        if not isinstance(node, ast.Module | ast.ClassDef):
            texts.append(_code(node, lines))
        for text in texts:
            text = _cut(_NAMES.sub("_", _IMPORT.sub("", text)).strip())
            if len(text) >= _SHORTEST:
                yield Piece(
                    text=text,
                    label=module.partition(".")[0],
                    place=f"{PYTHON_PACKAGES}:{module}:{line}",
                    group=f"{module}:{top}",
                    side="train",
                )


_Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _nodes(node: _Node, top: str) -> Iterator[tuple[str, _Node]]:
    """Yield (outermost definition, node) for a node and all that are in it."""
    yield top, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for inside in definitions(node):
            yield from _nodes(inside, top or inside.name)


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """The source of a function without its docstring."""
    first, last = node.lineno - 1, node.end_lineno or node.lineno
    head, body = lines[first : node.body[0].lineno - 1], node.body
    if ast.get_docstring(node) is None:
        return textwrap.dedent("\n".join(lines[first:last]))
    if len(body) == 1:
        return ""
    rest = lines[(body[0].end_lineno or body[0].lineno) : last]
    return textwrap.dedent("\n".join([*head, *rest]))


def _cut(text: str) -> str:
    """Cut a text to its length at the end of a line, or else of a word."""
    if len(text) <= LONGEST:
        return text
    for mark in ("\n", " "):
        cut = text.rfind(mark, LONGEST // 2, LONGEST)
        if cut > 0:
            return text[:cut].rstrip()
    return text[:LONGEST]


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _grouped(found: list[Piece]) -> list[Piece]:
    """Let a file be one group where it is not most of its package."""
    packages = Counter(piece.label for piece in found)
    files = Counter(_file(piece) for piece in found)
    return [
        replace(piece, group=_file(piece))
        if files[_file(piece)] <= _ROOM * _HELD_OUT * packages[piece.label]
        else piece
        for piece in found
    ]


def _file(piece: Piece) -> str:
    return piece.group.partition(":")[0]


def _without_repeats(found: list[Piece]) -> list[Piece]:
    """Take out pieces whose words stand in two groups, and repeats within one."""
    groups: dict[str, set[str]] = defaultdict(set)
    for piece in found:
        groups[_words(piece.text)].add(piece.group)
    first = {_words(piece.text): piece for piece in reversed(found)}
    return [
        piece
        for piece in found
        if len(groups[_words(piece.text)]) == 1 and first[_words(piece.text)] is piece
    ]


def _sides(found: list[Piece]) -> dict[str, Side]:
    """Put the groups of each package on sides, by the hash of their names, until the
    shares are full; a group that does not fit is training text."""
    sizes: dict[str, Counter[str]] = defaultdict(Counter)
    for piece in found:
        sizes[piece.label][piece.group] += 1
    sides: dict[str, Side] = {}
    for groups in sizes.values():
        wanted = _HELD_OUT * groups.total()
        order = sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest())
        for side in _HELD_OUT_SIDES:
            taken = 0
            for name in order:
                fits = taken + groups[name] <= _ROOM * wanted
                if name not in sides and taken < wanted and fits:
                    sides[name] = side
                    taken += groups[name]
        sides |= {name: "train" for name in order if name not in sides}
    return sides
