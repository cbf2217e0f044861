#!/usr/bin/env python3
"""What replicas send, and what it costs in loss: every step, or rounds of local ones.

    .venv/bin/python tools/bench/sync.py [--json] [--steps 900]

Two simulated replicas (CPU devices of one process: no speed is measured) learn the
quickstart's text with its model, from the same batches and for equally many tokens.
`bytes` is what a device sends to the other replica per step: by the formula of
training/local.py, and as counted in the compiled program, whose agreement runs once in
`sync.steps` steps. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

REPLICAS, BATCH, SEQ_LEN = 2, 8, 128
LOCAL = ["sync.strategy=local"]
GENTLE = ["sync.learning_rate=0.4", "sync.momentum=0.5"]
STRATEGIES = {
    "every step": [],
    "local 10": [*LOCAL, "sync.steps=10"],
    "local 50": [*LOCAL, "sync.steps=50"],
    "local 10 gentle": [*LOCAL, "sync.steps=10", *GENTLE],
}
"""Name -> what is set: steps between agreements, and the outer optimizer, which is
DiLoCo's (0.7, momentum 0.9) or a gentler one."""


def trained(name: str, steps: int) -> dict[str, float]:
    """Train with one strategy; figures of its report, and the bytes counted."""
    from llmos_jax import driver
    from llmos_jax.config import load_config

    with tempfile.TemporaryDirectory() as folder:
        config = load_config("quickstart", _settings(name, steps, folder)).config
        report = driver.train(config)
        counted = _counted(config)
    names = ("val_loss", "val_bits_per_byte", "tokens_seen", "train_s")
    return {
        "bytes_per_step": report["replica_bytes_per_step"],
        "counted_bytes_per_step": counted,
        **{name: report[name] for name in names},
    }


def _settings(name: str, steps: int, folder: str) -> list[str]:
    sets = [
        f"run.dir={folder}",
        f"topology=cpu:{REPLICAS}",
        f"plan.mesh.data={REPLICAS}",
        f"batch.global={BATCH}",
        f"batch.seq_len={SEQ_LEN}",
        f"train.steps={steps}",
        "train.max_minutes=60",
        "train.eval_every=0",
        f"checkpoint.every={steps}",
        "generate.prompts=[]",
    ]
    return [*sets, *STRATEGIES[name]]


def _counted(config: object) -> float:
    """Bytes that the compiled program's sums over `data` send, per step on average."""
    from llmos_jax import driver, lowering, models, training

    plan = driver.plan(config)  # type: ignore[arg-type]
    session = training.open_session(models.skeleton(plan.params.spec), plan, config)
    session.program.compile()
    found = lowering.collectives_of(session.program.as_text(), session.mesh)
    crossing = [item for item in found if "data" in item.axes]
    assert all(item.op == "all-reduce" for item in crossing), crossing
    every = max(plan.workload.local_steps, 1)
    return sum(
        2 * (REPLICAS - 1) / REPLICAS * item.total_bytes / (every if is_rare else 1)
        for item in crossing
        for is_rare in ("/cond/" in item.where,)
    )


def main() -> None:
    """One process per strategy, one after another; then a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--worker", choices=STRATEGIES)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(trained(arguments.worker, arguments.steps)))
        return
    results = {name: _turn(name, arguments.steps) for name in STRATEGIES}
    print(json.dumps(results) if arguments.json else _table(results))


def _turn(name: str, steps: int) -> dict[str, float]:
    flags = f"--xla_force_host_platform_device_count={REPLICAS}"
    done = subprocess.run(
        [sys.executable, str(pathlib.Path(__file__).resolve())]
        + ["--worker", name, "--steps", str(steps)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    if done.returncode:
        sys.exit(f"error: {name} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    note = f"{name:<15}  val_loss {result['val_loss']:.4f}  {result['train_s']:.0f} s"
    print(note, file=sys.stderr, flush=True)
    return result


def _table(results: dict[str, dict[str, float]]) -> str:
    base = results["every step"]
    rows = [
        "strategy         bytes/step    counted    less  val_loss  bits/byte   against"
    ]
    for name, row in results.items():
        less = base["bytes_per_step"] / row["bytes_per_step"]
        against = row["val_loss"] / base["val_loss"] - 1
        rows.append(
            f"{name:<15}{row['bytes_per_step']:12.4g}"
            f"{row['counted_bytes_per_step']:11.4g}{less:7.0f}x{row['val_loss']:10.4f}"
            f"{row['val_bits_per_byte']:11.4f}{against:+10.2%}"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    main()
