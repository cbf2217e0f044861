#!/usr/bin/env python3
"""Every parallelism, compiled for pods that are not here: do they fit, as planned?

    .venv/bin/python tools/bench/aot.py [--only TEXT] [--kept FILE] [--full-effort]
        [--json]

Each case is planned as a user would (what is not pinned is free), then the exact step
is compiled by the real TPU compiler for the exact topology (needs libtpu:
pip install -e .[aot]), its memory read off and its collectives audited. XLA's effort is
lowered as for a probe; --full-effort compiles as `plan --verify compile` does. A train
step takes one to ten minutes on two cores, a step that serves (`--only serve`) half a
minute. --kept FILE appends each result to FILE and skips what is there: a run can be
cut short and go on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from llmos_jax import driver, models, resolve
from llmos_jax.config import load_config
from llmos_jax.errors import DoesNotFit, LlmosError
from llmos_jax.lowering.verify import PROBE_EFFORT
from llmos_jax.telemetry import log

_SERVE = "plan.phase=decode serve.kv_dtype=int8 batch.global=64 batch.seq_len=2048"
_INT8 = "serve.weight_dtype=int8 serve.activations=int8"
_FLOAT8 = "serve.weight_dtype=float8 serve.activations=float8"

CASES = {
    "70b-fsdp": "model=llama3_70b topology=v5p:4x4x8 batch.seq_len=8192 "
    "batch.per_device=2 plan.mesh.fsdp=128",
    "70b-fsdp-tensor": "model=llama3_70b topology=v5p:4x4x8 batch.seq_len=8192 "
    "batch.per_device=1 plan.mesh.fsdp=32 plan.mesh.tensor=4",
    "405b-2-slices": "model=llama3_405b topology=2*v6e:16x16 batch.seq_len=8192 "
    "batch.per_device=1",
    "mixtral-expert": "model=mixtral_8x7b topology=v5p:2x4x4 batch.seq_len=4096 "
    "batch.per_device=4 plan.mesh.expert=8",
    "8b-131072-context": "model=llama3_1_8b topology=v5p:4x4x4 batch.seq_len=131072 "
    "batch.global=8",
    "70b-4-stages-gpipe": "model=llama3_70b topology=4*v5e:16x16 batch.seq_len=4096 "
    "batch.global=1024 plan.mesh.stage=4 plan.mesh.data=1 plan.schedule=gpipe",
    "70b-4-stages-1f1b": "model=llama3_70b topology=4*v5e:16x16 batch.seq_len=4096 "
    "batch.global=1024 plan.mesh.stage=4 plan.mesh.data=1 plan.schedule=1f1b",
    "70b-4-stages-circular": "model=llama3_70b topology=4*v5e:16x16 batch.seq_len=4096 "
    "batch.global=1024 plan.mesh.stage=4 plan.mesh.data=1 plan.schedule=circular",
    **{
        f"serve-{name}": f"{_SERVE} {rest}"
        for name, rest in {
            "8b-v5e": f"model=llama3_8b topology=v5e:2x4 {_INT8}",
            "8b-v5p": f"model=llama3_8b topology=v5p:2x2x1 {_INT8}",
            "8b-v6e": f"model=llama3_8b topology=v6e:2x4 {_INT8}",
            "8b-tpu7x": f"model=llama3_8b topology=tpu7x:2x2x1 {_FLOAT8}",
            "8b-v5e-int4": "model=llama3_8b topology=v5e:2x4 serve.weight_dtype=int4 "
            "serve.group=128",
            "8b-v5e-prefill": f"model=llama3_8b topology=v5e:2x4 {_INT8} "
            "plan.phase=prefill batch.global=8",
            "8b-v5e-chunk": f"model=llama3_8b topology=v5e:2x4 {_INT8} "
            "plan.phase=prefill batch.global=1 batch.seq_len=512 serve.context=2048 "
            "plan.mesh.tensor=8",
            "70b-v5e": f"model=llama3_70b topology=v5e:4x4 {_INT8} plan.mesh.tensor=16",
            "70b-v5p": f"model=llama3_70b topology=v5p:2x2x2 {_INT8}",
            "70b-v6e": f"model=llama3_70b topology=v6e:2x4 {_INT8}",
            "70b-tpu7x": f"model=llama3_70b topology=tpu7x:2x2x1 {_FLOAT8}",
        }.items()
    },
}
"""Name -> what is asked of `plan`."""


def main() -> int:
    """Run the cases, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="names with TEXT")
    parser.add_argument("--kept", metavar="FILE", help="append results, skip known")
    parser.add_argument("--full-effort", action="store_true", help="XLA's own effort")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    kept = _known(asked.kept)
    rows = []
    for name in (name for name in CASES if asked.only in name):
        row = kept.get(name) or _run(name, asked.full_effort)
        rows.append(row)
        if asked.kept and name not in kept:
            with Path(asked.kept).open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(json.dumps(rows) if asked.json else _table(rows))
    return int(any("error" in row or row["unplanned"] for row in rows))


def _known(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None or not Path(path).is_file():
        return {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {row["name"]: row for row in rows}


def _run(name: str, full_effort: bool) -> dict[str, Any]:
    log(f"{name}: {CASES[name]}")
    config = load_config(None, CASES[name].split()).config
    try:
        chosen = driver.plan(config)
    except LlmosError as problem:
        return {"name": name, "error": str(problem)}
    row: dict[str, Any] = {
        "name": name,
        "topology": chosen.topology.name,
        "way": str(chosen.way),
        "predicted_bytes": chosen.predicted.peak_hbm_bytes,
        "step_s": chosen.predicted.step_s,
        "mfu": chosen.predicted.mfu,
    }
    skeleton = models.skeleton(chosen.params.spec or resolve.spec_of(config))
    options = None if full_effort else PROBE_EFFORT
    started = time.perf_counter()
    try:
        found = driver.ask_compiler(chosen, skeleton, config, "compile", options)
    except DoesNotFit as problem:
        return {**row, "error": f"{problem}", "compiled_bytes": problem.needed_bytes}
    except LlmosError as problem:
        return {**row, "error": str(problem)}
    return {
        **row,
        "compiled_bytes": found["peak_hbm_bytes"],
        "seconds": time.perf_counter() - started,
        "audited": found["audited"],
        "collectives": found["collectives"],
        "unplanned": found["unplanned_collectives"],
    }


def _table(rows: list[dict[str, Any]]) -> str:
    """As README.md shows it."""
    lines = [
        "| case | way | predicted | compiled | off | unplanned | compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['name']} | {row.get('way', '')} | {row['error']} |")
            continue
        off = row["predicted_bytes"] / row["compiled_bytes"] - 1
        unplanned = str(len(row["unplanned"])) if row["audited"] else "not audited"
        lines.append(
            f"| {row['name']}, {row['topology']} | {row['way']} "
            f"| {row['predicted_bytes'] / 2**30:.1f} GiB "
            f"| {row['compiled_bytes'] / 2**30:.1f} GiB | {100 * off:+.1f} % "
            f"| {unplanned} | {row['seconds']:.0f} s |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
