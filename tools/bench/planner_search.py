#!/usr/bin/env python3
"""How long the closed-form search takes, imports aside.

.venv/bin/python tools/bench/planner_search.py [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

from llmos_jax import models, planner
from llmos_jax.config import load_model
from llmos_jax.ir import Workload

CASES = (
    ("llama3_405b", "v5p:8x8x16", 2048, 8192),
    ("llama3_405b", "2*v5p:8x8x16", 2048, 8192),
    ("llama3_70b", "v5p:4x4x4", 128, 4096),
    ("llama3_8b", "v6e:2x4", 24, 8192),
    ("qwen3_0_6b", "v5e:2x2", 16, 2048),
)
ROUNDS = 5


def main() -> int:
    """Plan each case several times; print medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = []
    for model, topology, batch, seq_len in CASES:
        table = models.param_table(load_model(model))
        work = Workload(global_batch=batch, seq_len=seq_len)
        seconds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            chosen = planner.plan(table, topology, work, "llama")
            seconds.append(time.perf_counter() - started)
        rows.append(
            {
                "model": model,
                "topology": topology,
                "batch": batch,
                "seq_len": seq_len,
                "candidates": chosen.candidates,
                "first_s": seconds[0],
                "median_s": statistics.median(seconds),
                "mesh": str(chosen.mesh),
            }
        )
    if asked.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        where = f"{row['model']:<12} {row['topology']:<12} {row['mesh']}"
        times = f"first {row['first_s']:.3f} s, median {row['median_s']:.3f} s"
        print(f"{where:<50} {row['candidates']:>5} candidates, {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
