"""tools/bench/decode.py and quality.py count right, and their workers keep apart."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

Bench = Callable[[str], ModuleType]
BENCH = Path(__file__).parents[2] / "tools" / "bench"
TALKS = """
import os
from workers import serve
def double(number):
    print("a library says hello")
    os.write(1, b"and its C library too")
    return 2 * number
serve({"double": double, "die": os.abort})
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Import a module of tools/bench by name."""
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setenv("PYTHONPATH", str(BENCH))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return importlib.import_module


def test_a_worker_answers_whatever_its_libraries_print(bench: Bench) -> None:
    worker = bench("workers").Worker(sys.executable, "-c", TALKS)
    assert [worker.ask("double", number=n) for n in (3, 4)] == [6, 8]
    worker.close()


def test_a_worker_that_dies_says_at_what(bench: Bench) -> None:
    workers = bench("workers")
    worker = workers.Worker(sys.executable, "-c", TALKS)
    with pytest.raises(workers.WorkerDied, match=r"status -6 at 'die'"):
        worker.ask("die")


def test_ratios_are_of_medians_and_named_as_the_contract_says(bench: Bench) -> None:
    decode = bench("decode")
    cases = ("1", "4", "8", "16", "32", "prefill 128", "prefill 512")
    times = {
        decode.OURS: {case: [1.0, 2.0, 9.0] for case in cases},
        decode.THEIRS: {case: [3.0, 100.0, 2.0] for case in cases},
        decode.OURS_INT4: {},
    }
    expected = {"1": 1.5, "8": 1.5, "32": 1.5, "prefill": 1.5}
    assert decode.ratios(times)["ratio_to_llama_cpp"] == expected


def test_a_peer_that_is_not_there_has_no_ratio(bench: Bench) -> None:
    decode = bench("decode")
    found = decode.ratios({decode.OURS: {"1": [1.0]}, decode.OURS_INT4: {}})
    assert found == {"ratio_to_llama_cpp": {}, "int4_ratio_to_llama_cpp": {}}


def test_divergence_nats_and_agreement_are_those_of_the_distributions(
    bench: Bench,
) -> None:
    right = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]], np.float32)) + 7
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]], np.float32)) - 3
    found = bench("quality").compared(right, other, np.array([1, 0], np.int32))
    nats, divergence, is_same = map(np.asarray, found)
    np.testing.assert_allclose(nats, [math.log(2), math.log(10)], rtol=1e-5)
    np.testing.assert_allclose(divergence, [0.25 * math.log(2), 0], atol=1e-6)
    assert is_same.tolist() == [False, True]


def test_half_of_each_chunk_is_context(bench: Bench) -> None:
    """As in llama-perplexity: tokens 257 to 511 of 512 are predicted."""
    quality = bench("quality")
    seen = []

    def logits(chunk: np.ndarray) -> np.ndarray:
        seen.append(chunk)
        # Sure of the token that follows, among 600.
        return np.eye(600, dtype=np.float32)[chunk[quality.FIRST + 1 :]] * 100

    chunks = [np.arange(512, dtype=np.int32), np.arange(512, dtype=np.int32)[::-1]]
    rows = quality.scored(logits, {"other": logits}, chunks)
    assert rows["other"]["tokens"] == 2 * 255
    assert rows["other"]["perplexity"] == pytest.approx(1)
    assert rows["other"]["mean_kld"] == 0
