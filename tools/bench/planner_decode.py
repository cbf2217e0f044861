#!/usr/bin/env python3
"""Predicted against published decode speeds: Llama-3.1-70B in int8 on v5e-16.

    .venv/bin/python tools/bench/planner_decode.py [--json]

The table is jax-llm-examples llama3/README.md (commit 440b2a0, jax 0.6.0), tokens/s of
one sequence: int8 weights and cache, products in bfloat16, TP16, or DP2 x TP8. No
device is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from llmos_jax.config import load_model
from llmos_jax.hardware import parse_topology
from llmos_jax.ir import MeshShape, ParamTable, Quantization, Way, Workload
from llmos_jax.models import param_table
from llmos_jax.planner import sizes_of
from llmos_jax.planner.collectives import links_of
from llmos_jax.planner.cost import estimate
from llmos_jax.planner.layout import lay_out
from llmos_jax.rules import load_rules

CONTEXTS = (2048, 4096, 8192)
# (tensor, sequences) -> tokens/s of one sequence at each context, as far as published.
PUBLISHED = {
    (16, 8): (159, 146, 146),
    (16, 16): (135, 129, 123),
    (16, 32): (108, 100, 93.8),
    (16, 64): (68.7, 62.7),
    (16, 128): (39.3,),
    (8, 8): (84.4, 83.4, 81.7),
    (8, 16): (80.2, 79.5, 76.9),
    (8, 32): (74.5, 74, 71.3),
    (8, 64): (58.4, 58.1),
    (8, 128): (50.2,),
}
TOPOLOGY = parse_topology("v5e:4x4")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    spec = replace(load_model("llama3_70b"), quantization=Quantization(weights="int8"))
    table = param_table(spec)
    rows = [
        _row(table, tensor, batch, context, speed)
        for (tensor, batch), speeds in PUBLISHED.items()
        for context, speed in zip(CONTEXTS, speeds, strict=False)
    ]
    errors = sorted(abs(row["error"]) for row in rows)
    answer = {"rows": rows, "worst": errors[-1], "median": errors[len(errors) // 2]}
    print(json.dumps(answer, indent=1) if options.json else _table(answer))
    return 0


def step_s(table: ParamTable, tensor: int, batch: int, context: int) -> float:
    """Predicted seconds of a step that gives each sequence one token."""
    work = Workload(
        phase="decode",
        global_batch=batch,
        seq_len=context,
        param_dtype="int8",
        kv_dtype="int8",
    )
    mesh = MeshShape(data=16 // tensor, tensor=tensor)
    sizes, links = sizes_of(table), links_of(TOPOLOGY, mesh)
    layout = lay_out(table, load_rules("llama", "decode"), sizes, work, mesh)
    way = Way(mesh=mesh)
    return estimate(layout, way, {}, links, sizes, TOPOLOGY, work).predicted.step_s


def _row(
    table: ParamTable, tensor: int, batch: int, context: int, speed: float
) -> dict[str, float]:
    seconds = step_s(table, tensor, batch, context)
    return {
        "tensor": tensor,
        "data": 16 // tensor,
        "sequences": batch,
        "context": context,
        "published_tokens_per_s": speed,
        "predicted_tokens_per_s": 1 / seconds,
        "error": seconds * speed - 1,
    }


def _table(answer: dict[str, object]) -> str:
    lines = ["layout      batch  context  published  predicted  step error"]
    for row in answer["rows"]:
        lines.append(
            f"DP{row['data']} x TP{row['tensor']:<2}  {row['sequences']:6} "
            f"{row['context']:8} {row['published_tokens_per_s']:10.1f} "
            f"{row['predicted_tokens_per_s']:10.1f} {row['error']:+10.1%}"
        )
    lines.append(f"median {answer['median']:.1%}, worst {answer['worst']:.1%}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
