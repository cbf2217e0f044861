"""One reader for each folder of data, one place that prints, no path of one machine."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "llmos_jax"
READERS = {"configs": "config/load.py", "sharding_rules": "rules/load.py"}
MACHINE_PATH = re.compile(
    r"(?<![\w.<>{}/*-])/(?:root|home/\w+|Users/\w+|work|tmp/dev|mnt)/[\w.]"
)
SKIPPED = {".git", "runs", "build", "dist", "__pycache__"}


def calls(source: str, name: str) -> Iterator[ast.Call]:
    """Calls of a plain function name or of a method of that name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func
            found = called.id if isinstance(called, ast.Name) else None
            found = called.attr if isinstance(called, ast.Attribute) else found
            if found == name:
                yield node


def folders_asked_for(source: str) -> set[str]:
    """What is given to `places.data_folder`, the only way to the data folders."""
    named = {
        node.targets[0].id: node.value.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    given = [each for call in calls(source, "data_folder") for each in call.args]
    constants = {each.value for each in given if isinstance(each, ast.Constant)}
    return constants | {named[x.id] for x in given if isinstance(x, ast.Name)}


def prints(source: str) -> list[int]:
    return [
        call.lineno
        for call in calls(source, "print")
        if isinstance(call.func, ast.Name)
    ]


def text_files() -> list[Path]:
    """Files that are or would be committed; without git, all that is not output."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        found = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        found = [
            file
            for file in ROOT.rglob("*")
            if not any(
                part in SKIPPED or part.startswith(".venv") or part.endswith("_cache")
                for part in file.relative_to(ROOT).parts
            )
        ]
    return [
        file for file in found if file.is_file() and file.stat().st_size < 1_000_000
    ]


@pytest.mark.parametrize("folder", sorted(READERS))
def test_data_folder_has_one_reader(folder):
    readers = [
        file.relative_to(PACKAGE).as_posix()
        for file in sorted(PACKAGE.rglob("*.py"))
        if folder in folders_asked_for(file.read_text(encoding="utf-8"))
    ]
    assert readers == [READERS[folder]]


def test_only_cli_prints():
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] != "cli"
        for line in prints(file.read_text(encoding="utf-8"))
    ]
    assert not wrong, f"only llmos_jax/cli prints; log elsewhere: {wrong}"


def test_no_file_names_a_path_of_one_machine():
    wrong = [
        f"{file.relative_to(ROOT)}: {match.group()}"
        for file in text_files()
        for match in MACHINE_PATH.finditer(file.read_text("utf-8", errors="ignore"))
    ]
    assert not wrong, f"paths that exist on one machine only: {wrong}"


def test_the_checks_can_fail():
    assert folders_asked_for("places.data_folder('configs')") == {"configs"}
    assert folders_asked_for("F = 'configs'\ndata_folder(F)") == {"configs"}
    assert prints("x = 1\nprint(x)\nconsole.print(x)") == [2]
    assert MACHINE_PATH.search("see /" + "root/thing")
    harmless = "runs/{}/x, ~/.cache, <run>/{}/x".format("work", "root")
    assert not MACHINE_PATH.search(harmless)
