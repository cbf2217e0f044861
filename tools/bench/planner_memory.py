#!/usr/bin/env python3
"""Predicted against compiled peak memory of training steps, for TPUs that are not here.

    .venv/bin/python tools/bench/planner_memory.py [--probe] [--slow] [--only TEXT]
        [--kept FILE] [--fit] [--json]

Each case pins mesh, remat and microbatches, and compiles the exact program for the
exact topology (needs libtpu: pip install -e .[aot]). --probe also compiles the two
short programs of a probe. XLA's effort is lowered as for a probe, which halves the time
and was seen to move the peak by 1 %; --slow compiles as `plan --verify compile` does.
About half a minute a case on two cores. --kept FILE appends each result to FILE and
skips what is there: a run can be cut short and go on. --fit prints the constants of
planner/memory.py fitted to what was compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmos_jax import driver, models, resolve
from llmos_jax.config import RunConfig, load_config
from llmos_jax.errors import DoesNotFit, LlmosError
from llmos_jax.lowering.verify import PROBE_EFFORT
from llmos_jax.planner.layout import lay_out
from llmos_jax.planner.memory import FITTED_MEMORY, FittedMemory, Memory, memory_of
from llmos_jax.planner.sizes import sizes_of
from llmos_jax.telemetry import log

CASES = """
qwen3_0_6b   v6e:2x2   4   2048 full
qwen3_0_6b   v5e:2x4   1   2048 full      data=8
qwen3_0_6b   v5e:2x2   2   2048 dots
qwen3_0_6b   v5p:2x2x1 8   2048 none
qwen3_0_6b   v6e:2x4   4   2048 attention tensor=2
qwen3_0_6b   v5e:2x2   4   1024 full      microbatches=2
qwen3_0_6b   v6e:2x2   2   2048 attention
qwen3_0_6b   v5e:2x2   1   2048 none
llama3_2_3b  v5e:4x4   1   2048 full
llama3_2_3b  v5p:2x2x1 2   4096 none
llama3_2_3b  v6e:2x4   2   4096 attention
llama3_2_3b  v5p:2x2x2 4   2048 dots      tensor=2
llama3_2_3b  v5e:4x4   2   2048 full      tensor=4
llama3_2_3b  v6e:4x4   2   2048 full      data=4
llama3_2_3b  v6e:2x4   4   2048 full
llama3_2_3b  v5p:2x2x1 8   4096 full
llama3_8b    v6e:2x4   3   8192 full
llama3_8b    v5e:4x4   1   2048 full
llama3_8b    v5p:2x2x2 4   4096 full
llama3_8b    v6e:4x4   1   4096 dots      tensor=2
llama3_8b    v5p:2x2x2 2   4096 attention
llama3_8b    v6e:4x4   4   4096 full      microbatches=2
llama3_8b    v5e:8x8   1   2048 dots      tensor=2
llama3_8b    v6e:2x4   2   8192 full      offload=layer_input
llama3_8b    v5p:2x2x2 1   4096 dots
llama3_8b    v5p:2x2x1 1   2048 full
llama3_8b    v6e:4x4   2   4096 attention
llama3_70b   v5p:4x4x4 2   4096 full
llama3_70b   v5p:4x4x8 1   2048 full
llama3_70b   v6e:16x16 1   2048 full
llama3_70b   v6e:8x8   0.5 4096 full      tensor=2
llama3_70b   v5p:4x4x4 2   2048 attention tensor=2
llama3_70b   v5p:4x4x4 4   4096 full      microbatches=2
llama3_70b   v6e:16x16 2   4096 full
llama3_70b   v5p:4x4x4 1   8192 attention
llama3_405b  v5p:8x8x8 1   8192 full
"""
"""Model, topology, batch per device, sequence, remat; other mesh axes, microbatches and
what is offloaded. fsdp takes the devices that are left."""


def main() -> int:
    """Run the cases, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--probe", action="store_true", help="also probe each case")
    parser.add_argument("--slow", action="store_true", help="XLA's full effort")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT")
    parser.add_argument("--kept", metavar="FILE", help="append results, skip known")
    parser.add_argument("--fit", action="store_true", help="print fitted constants")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    cases = [" ".join(line.split()) for line in CASES.strip().splitlines()]
    kept = _known(asked.kept)
    rows = []
    for number, case in enumerate((c for c in cases if asked.only in c), 1):
        log(f"{number}: {case}")
        before = kept.get(case, {})
        row = {**before, **_run(case, asked.probe, asked.slow, before)}
        rows.append(row)
        if asked.kept and row != before:
            with Path(asked.kept).open("a") as file:
                file.write(json.dumps(row) + "\n")
    summary = {kind: _errors(rows, kind) for kind in ("estimate", "probe")}
    if asked.fit:
        print(fit(rows))
    elif asked.json:
        print(json.dumps({"rows": rows, "errors": summary}))
    else:
        print(_table(rows, summary))
    return 0


def _known(path: str | None) -> dict[str, dict[str, Any]]:
    if path is None or not Path(path).is_file():
        return {}
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return {row["case"]: row for row in rows}


def _run(case: str, probe: bool, slow: bool, before: dict[str, Any]) -> dict[str, Any]:
    config = _config(case)
    try:
        chosen = driver.plan(config)
    except LlmosError as problem:
        return {"case": case, "error": str(problem).splitlines()[-1].strip()}
    row: dict[str, Any] = {
        "case": case,
        "estimate": chosen.predicted.peak_hbm_bytes,
        "stack": chosen.predicted.memory,
    }
    for how in ("compile", *(["probe"] if probe else [])):
        if how in before:
            continue
        skeleton = models.skeleton(resolve.spec_of(config))
        started = time.perf_counter()
        options = None if slow else PROBE_EFFORT
        try:
            found = driver.ask_compiler(chosen, skeleton, config, how, options)
            row[how] = found["peak_hbm_bytes"]
            row["argument_bytes"] = found["argument_bytes"]
            row["temp_bytes"] = found["temp_bytes"]
            row[f"{how}_unplanned"] = len(found["unplanned_collectives"])
        except DoesNotFit as problem:
            row[how] = problem.needed_bytes
            row[f"{how}_refused"] = True
        row[f"{how}_s"] = round(time.perf_counter() - started, 1)
    return row


def _config(case: str) -> RunConfig:
    """The run that a case pins down."""
    model, topology, per_device, seq_len, remat, *pins = case.split()
    given = dict(pin.split("=") for pin in pins)
    parts, offload = given.pop("microbatches", "1"), given.pop("offload", "")
    mesh = dict.fromkeys(("data", "tensor", "stage", "context", "expert"), "1")
    return load_config(
        None,
        [
            f"model={model}",
            f"topology={topology}",
            f"batch.per_device={per_device}",
            f"batch.seq_len={seq_len}",
            f"plan.remat={remat}",
            f"plan.microbatches={parts}",
            f"plan.offload={[offload] if offload else []}",
            *(f"plan.mesh.{axis}={size}" for axis, size in {**mesh, **given}.items()),
        ],
    ).config


def fit(rows: list[dict[str, Any]], rounds: int = 20000) -> FittedMemory:
    """Constants drawn at random around the best so far, by relative errors of the
    peak; a constant costs a little for leaving where it stands now."""
    known = [_asked(row) for row in rows if row.get("compile") and "stack" in row]
    names = [field.name for field in dataclasses.fields(FittedMemory)]
    chance = random.Random(0)
    start = {name: getattr(FITTED_MEMORY, name) for name in names}

    def loss(values: dict[str, float]) -> float:
        fitted = FittedMemory(**values)
        errors = [
            math.log(sum(predicted(fitted=fitted).values()) / peak)
            for predicted, peak in known
        ]
        moved = sum(math.log(values[name] / start[name]) ** 2 for name in names)
        squares = sum(error**2 for error in errors)
        return squares + 2 * max(map(abs, errors)) ** 2 + 1e-4 * moved

    best, least = start, loss(start)
    for turn in range(rounds):
        step = 0.3 * 0.6 ** (5 * turn / rounds)
        tried = dict(best)
        for name in chance.sample(names, chance.choice((1, 1, 2, 3))):
            tried[name] *= math.exp(chance.gauss(0, step))
        if (found := loss(tried)) < least:
            best, least = tried, found
    return FittedMemory(**{name: float(f"{best[name]:.3g}") for name in names})


def _asked(row: dict[str, Any]) -> tuple[Callable[..., Memory], float]:
    """`memory_of` of a case, but for the constants, and what the compiler said."""
    chosen = driver.plan(_config(row["case"]))
    table, sizes = chosen.params, sizes_of(chosen.params)
    layout = lay_out(table, chosen.rules, sizes, chosen.workload, chosen.mesh)
    predicted = functools.partial(
        memory_of, layout, chosen.way, sizes, chosen.topology, chosen.workload
    )
    return predicted, row["compile"]


def _errors(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    errors = [
        abs(row[kind] / row["compile"] - 1)
        for row in rows
        if kind in row and "compile" in row
    ]
    if not errors:
        return {}
    return {
        "cases": len(errors),
        "median": statistics.median(errors),
        "worst": max(errors),
    }


def _table(rows: list[dict[str, Any]], summary: dict[str, dict[str, float]]) -> str:
    lines = [f"{'case':<58} {'compiled':>9} {'estimate':>9} {'probe':>8}"]
    for row in rows:
        peak = row.get("compile")
        cells = [f"{row['case']:<58}"]
        if peak is None:
            cells.append(row.get("error", "?")[:60])
        else:
            refused = "!" if row.get("compile_refused") else " "
            cells.append(f"{peak / 1e9:7.2f}GB{refused}")
            for kind in ("estimate", "probe"):
                error = row[kind] / peak - 1 if kind in row else None
                cells.append(" " * 8 if error is None else f"{error:+8.1%}")
        lines.append(" ".join(cells))
    for kind, found in summary.items():
        if found:
            lines.append(
                f"{kind} against compile, {found['cases']:.0f} cases: median error "
                f"{found['median']:.1%}, worst {found['worst']:.1%}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
