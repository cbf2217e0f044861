"""The README's Python runs, and the files and verbs it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llmos_jax import driver
from llmos_jax.cli.main import VERBS
from llmos_jax.config import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_plan_shown_is_the_plan_printed() -> None:
    command = re.search(r"\$ python -m llmos_jax.plan (.*?)\n(?=Plan )", README, re.S)
    shown = re.search(r"\n(Plan [0-9a-f]{16}\n.*?)```", README, re.S)
    assert command and shown
    settings = re.findall(r"--set (\S+)", command[1])
    printed = driver.plan(load_config(None, settings).config).explain().splitlines()
    lines = [line for line in shown[1].splitlines() if line.strip() != "[...]"]
    assert [line for line in lines if line not in printed] == []


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [link for link in links if not (ROOT / link).exists()]
    assert links and not missing


def test_every_verb_is_shown() -> None:
    assert [verb for verb in VERBS if f"llmos_jax.{verb}" not in README] == []
