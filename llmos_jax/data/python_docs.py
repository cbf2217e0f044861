"""Turn the Python that is running into text to learn from: English and code.

Three kinds of document, told apart by the first part of their names:

- `topics/NAME`: a chapter of the language reference, as `help("NAME")` shows it;
- `docs/MODULE`: the docstrings of a standard library module, under their dotted names;
- `source/MODULE`: its source. Nothing is imported to read either: `ast` does.

Left out: tests, generated tables, bundled packages, what names this machine. The
chapters of `pydoc_data` overlap (`for` is a part of `compound`), so a paragraph is kept
only where it stands first, longest chapter first; otherwise held-out text would be in
training too.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llmos_jax.data.document import Document
from llmos_jax.errors import DataError

_SKIPPED_FOLDERS = frozenset(
    "test tests site-packages dist-packages idlelib lib2to3 ensurepip pydoc_data "
    "__pycache__ turtledemo msilib".split()
)
_SKIPPED_FILES = re.compile(r"_sysconfigdata.*|_sysconfig_vars.*|(site|user)customize")
# A line that begins with a literal is a row of a table. At 0.45 the rule takes the 75
# character maps of encodings/, html.entities, stringprep, locale's aliases, and no
# module of code (every file over 4 KB of Python 3.11 was looked at).
_TABLE_ROW = re.compile(r"""\s*(['"\[({\\\d-]|[bu]')""")
_TABLE_SHARE = 0.45
_TABLE_BYTES = 4096
_FEWEST_DOC_CHARACTERS = 200
# Modules that repeat one another word for word are on one side of the split.
_TWINS = {"ntpath": "posixpath", "genericpath": "posixpath"}
# Hashed with each group's name. 14 is the first number from 0 with which 3% held out is
# within 15% of 3% of every kind of document on Python 3.11, 3.12, 3.13 and Debian's
# 3.11, and no document in it is longer than 70 KB. How well anything compresses was not
# looked at. Changing it moves text between training and held-out.
_SALT = 14

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documents() -> Iterator[Document]:
    """Yield the chapters, then the docstrings, then the source, each sorted by name.

    Raises:
        DataError: this Python was installed without its library or reference.
    """
    library = modules()
    for name, text in _chapters():
        yield Document(name=f"topics/{name}", text=text, group=f"topic {name} {_SALT}")
    for name, path in library:
        text = _docstrings(name, source_of(path))
        if len(text) >= _FEWEST_DOC_CHARACTERS:
            yield Document(name=f"docs/{name}", text=text, group=_group(name))
    for name, path in library:
        source = source_of(path)
        if source.strip():
            yield Document(name=f"source/{name}", text=source, group=_group(name))


def fingerprint() -> list[Any]:
    """Return what the text depends on: the Python and the stamps of its files."""
    files = [path for _, path in modules()]
    stamps = [(str(path), path.stat()) for path in [*files, _reference()]]
    return [
        sys.version,
        [[name, facts.st_size, facts.st_mtime_ns] for name, facts in stamps],
    ]


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _reference() -> Path:
    path = _library() / "pydoc_data" / "topics.py"
    if path.is_file():
        return path
    raise DataError(
        f"python-docs: {path} is missing, so this Python was installed without its "
        "reference. Install the full library (Debian: `apt install "
        "libpython3-stdlib`), or name your own text in data.train."
    )


def modules() -> list[tuple[str, Path]]:
    """Return (dotted name, path) of each module worth reading, sorted by name."""
    library = _library()
    found = []
    for path in library.rglob("*.py"):
        parts = path.relative_to(library).with_suffix("").parts
        if _SKIPPED_FOLDERS & set(parts[:-1]) or _SKIPPED_FILES.fullmatch(parts[-1]):
            continue
        name = ".".join(parts).removesuffix(".__init__")
        found.append((name, path))
    if not found:
        raise DataError(
            f"python-docs: no module source in {library}; this Python keeps its "
            "library elsewhere. Name your own text in data.train."
        )
    return sorted(found)


def _group(module: str) -> str:
    """Name a module for the split; `_pydecimal` and `decimal` are one."""
    public = module.removeprefix("_py").lstrip("_")
    return f"module {_TWINS.get(public, public)} {_SALT}"


def _chapters() -> Iterator[tuple[str, str]]:
    _reference()
    from pydoc_data.topics import topics  # half a megabyte, wanted here alone

    seen: set[str] = set()
    chapters = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        text = _without_repeats(plain(topics[name]), seen)
        if text:
            chapters[name] = text
    yield from sorted(chapters.items())


def _without_repeats(text: str, seen: set[str]) -> str:
    """Return the paragraphs that are new; nothing where most of them are not."""
    fresh = []
    for paragraph in re.split(r"\n\s*\n", text):
        key = " ".join(paragraph.split())
        if key and key not in seen:
            fresh.append(paragraph)
        seen.add(key)
    kept = "\n\n".join(fresh)
    return f"{kept}\n" if 2 * len(kept) > len(text) else ""


def plain(text: str) -> str:
    """Take out reStructuredText's lines under titles, roles and doubled backticks."""
    text = re.sub(r"(?m)^([*=~^\"-])\1{3,}\n", "", text)
    text = re.sub(r":(?:\w+:)*\w+:`([^`]+)`", r"`\1`", text)
    return text.replace("``", "`")


def source_of(path: Path) -> str:
    """Return a module's source, or nothing where it is a table or not this Python's."""
    try:
        with tokenize.open(path) as file:
            source = file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""
    rows = [line for line in source.splitlines() if line.strip()]
    table_rows = sum(1 for row in rows if _TABLE_ROW.match(row))
    is_table = len(source) > _TABLE_BYTES and table_rows > _TABLE_SHARE * len(rows)
    return "" if is_table else source


def _docstrings(module: str, source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # the library's own, not ours
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return ""
    parts = [f"{name}\n\n{plain(doc)}\n" for name, doc in _walk(tree, module)]
    return "\n".join(parts)


def _walk(node: ast.Module | _Definition, name: str) -> Iterator[tuple[str, str]]:
    doc = ast.get_docstring(node)
    if doc and doc.strip():
        yield name, doc
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return
    for definition in definitions(node):
        yield from _walk(definition, f"{name}.{definition.name}")


def definitions(node: ast.AST) -> Iterator[_Definition]:
    """Yield the classes and functions of a module or class, also those that a
    condition defines."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        elif isinstance(child, ast.If | ast.Try):
            yield from definitions(child)
