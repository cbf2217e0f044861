"""The bench of classifiers: fixed splits, repaired rows, a baseline that learns."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tools" / "bench" / "classify.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("classify_bench", BENCH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Subj in small: 200 lines in Latin-1."""
    folder = tmp_path_factory.mktemp("classify")
    lines = [
        f"{n % 2} {'plot' if n % 2 else 'view'} number {n} caf\u00e9"
        for n in range(200)
    ]
    (folder / "subj.all").write_bytes("\n".join(lines).encode("latin-1"))
    return folder


def test_the_split_is_fixed_and_whole(bench, data):
    one, other = bench.subj(data), bench.subj(data)
    assert one == other
    assert {name: len(rows) for name, rows in one.parts.items()} == {
        "train": 162,
        "validation": 18,
        "test": 20,
    }
    assert len(set(one.texts("train", "validation", "test"))) == 200


def test_files_hold_the_rows_repaired(bench, data, tmp_path):
    files = bench.subj(data).write(tmp_path)
    lines = files["test"].read_text(encoding="utf-8").splitlines()
    assert len(lines) == 20
    assert all(line.endswith("caf\u00e9") for line in lines)


def test_the_baseline_is_scored_and_marked(data):
    pytest.importorskip("sklearn")
    done = subprocess.run(
        [sys.executable, str(BENCH), "--data", str(data), "--only", "subj"]
        + ["--models", "baseline", "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["test_accuracy"] for row in rows] == [1, 1]
    assert sum(row["is_baseline"] for row in rows) == 1
    assert "200 of 200 lines are not UTF-8" in done.stderr
