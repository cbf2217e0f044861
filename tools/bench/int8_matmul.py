#!/usr/bin/env python3
"""What rows times a matrix of few bits take: timed here, or compiled for a TPU.

    .venv/bin/python tools/bench/int8_matmul.py [--json] [--only TEXT]
    .venv/bin/python tools/bench/int8_matmul.py --compile v5e:2x2 [--write] [--json]

On a CPU every implementation multiplies SmolLM2-135M's matrices: milliseconds, medians.
On a TPU the tiles of `pallas_tpu` are timed for Llama 3's matrices, as one device has
them, and the best of each become rows of kernels/int8_matmul/blocks.toml.

With --compile no TPU is needed, but libtpu (pip install -e .[aot]). The TPU's compiler
writes down each kernel's instructions; a grid step runs them once, loops are unrolled.
A step takes the longer of its instructions, one a cycle, and of reading its piece at
the memory's speed; the first piece is read before anything runs. That is an estimate,
not a time: instructions may wait. --write puts a tile into the table where it is
estimated 5 % faster than the rule's.
"""

from __future__ import annotations

import argparse
import glob
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "llmos_jax/kernels/int8_matmul/blocks.toml"

SMOLLM = {"q": (576, 576), "gate": (576, 1536), "down": (1536, 576)}
SMOLLM_ROWS = (1, 4, 8, 16, 32, 512)

LLAMA = {
    "8b gate": (4096, 14336),
    "8b gate / 8": (4096, 1792),
    "8b down": (14336, 4096),
    "8b q": (4096, 4096),
    "8b k": (4096, 1024),
    "70b gate / 8": (8192, 3584),
    "70b gate / 16": (8192, 1792),
    "70b down / 8": (3584, 8192),
    "70b down / 16": (1792, 8192),
    "70b q / 8": (8192, 1024),
}
"""K, N of a device's part; `/ 8`: of eight devices."""

LLAMA_ROWS = (16, 64, 512)

KINDS = [
    ("int8", None, "int8"),
    ("int8", None, "none"),
    ("int4", 128, "none"),
    ("float8", None, "float8"),
]
"""Kind, group, activations."""

STORED = {"int8": "int8", "int4": "uint8", "float8": "float8_e4m3fn"}

CLOCK_HZ = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}
"""Peak bfloat16 FLOP/s (hardware/chips.py) over what the matrix units of a chip do in a
cycle: 4 of 128 x 128, 8 of them, and on v6e what 4 of 256 x 256 would (the compiler
makes 148,000 multiplications of an instruction there), two operations each."""

CORES = {"v5e": 1, "v5p": 2, "v6e": 1}
"""That share a device's memory, and its grid steps."""

STEP_S = 0.35e-6
"""Of a grid step beside its work (Pallas' TPU documentation)."""

GAIN = 0.05
"""Below, a tile is not worth a row of the table."""


def main() -> None:
    """Time, or compile; then a table or one JSON list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT")
    parser.add_argument("--compile", metavar="TOPOLOGY", help="v5e:2x2, v5p:2x2x1, ...")
    parser.add_argument("--write", action="store_true", help="rows into the table")
    asked = parser.parse_args()
    if asked.compile:
        rows = list(compiled(asked.compile, asked.only))
    else:
        import jax

        on_tpu = jax.default_backend() == "tpu"
        rows = list(timed_tiles(asked.only) if on_tpu else timed_here(asked.only))
    if asked.write:
        write(rows)
    print(json.dumps(rows) if asked.json else table(rows))


def timed_here(only: str) -> Iterator[dict[str, Any]]:
    """Milliseconds of each implementation on this machine."""
    import jax
    import jax.numpy as jnp

    from llmos_jax.kernels.int8_matmul import cpu, int8_matmul, quantized

    for (name, (K, N)), (kind, group, activations), m in cases(
        SMOLLM, [KINDS[0], KINDS[1], ("int4", 32, "none")], SMOLLM_ROWS, only
    ):
        key = jax.random.key(0)
        x = jax.random.normal(key, (m, K), jnp.float32)
        w = quantized(jax.random.normal(key, (K, N), jnp.float32), kind, group)
        row = described(name, m, K, N, kind, group, activations)
        for implementation in ("reference", "xla"):
            run = jax.jit(
                lambda x, w, name=implementation, how=activations: int8_matmul(
                    x, w, activations=how, implementation=name
                )
            )
            row[f"{implementation}_ms"] = 1e3 * seconds(run, x, w)
        if cpu.unavailable() is None:
            packed = cpu.pack([(np_of(w.values), np_of(w.scale))], kind=kind)
            run = jax.jit(
                lambda x, packed, how=activations: cpu.project(
                    x, packed, jnp.int32(0), activations=how
                )
            )
            row["cpu_ms"] = 1e3 * seconds(run, x, packed)
        yield row


def timed_tiles(only: str) -> Iterator[dict[str, Any]]:
    """Seconds of each tile on the TPU that is here."""
    import jax

    from llmos_jax.kernels.int8_matmul import pallas_tpu
    from llmos_jax.kernels.int8_matmul.blocks import generation

    for (name, (K, N)), (kind, group, activations), m in cases(
        LLAMA, KINDS, LLAMA_ROWS, only
    ):
        x, w = given(m, K, N, kind, group, jax.devices()[0])
        x, *w = (zeros(item) for item in (x, *w))
        for tile in tiles(m, K, N, kind, group, activations):
            run = kernel(pallas_tpu, activations, tile)
            row = described(name, m, K, N, kind, group, activations)
            yield {
                **row,
                "chip": generation(),
                "tile": list(tile),
                "estimate_us": 1e6 * seconds(run, x, *w),
                "basis": "timed",
            }


def compiled(topology: str, only: str) -> Iterator[dict[str, Any]]:
    """What the TPU's compiler makes of each tile."""
    folder = tempfile.mkdtemp()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["LIBTPU_INIT_ARGS"] = (
        f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    )
    import jax
    from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

    from llmos_jax.hardware import parse_topology
    from llmos_jax.kernels.int8_matmul import pallas_tpu
    from llmos_jax.kernels.target import Target, lowered_for
    from llmos_jax.lowering.topologies import compile_devices

    described_as = parse_topology(topology)
    device = compile_devices(described_as)[0]
    chip = described_as.chip.name
    here = AbstractDevice(device.device_kind, num_cores=1, platform="tpu")
    mesh = AbstractMesh((1,), ("one",), abstract_device=here)
    for (name, (K, N)), (kind, group, activations), m in cases(
        LLAMA, KINDS, LLAMA_ROWS, only
    ):
        x, w = given(m, K, N, kind, group, device)
        for tile in tiles(m, K, N, kind, group, activations):
            run = kernel(pallas_tpu, activations, tile)
            with lowered_for(Target("tpu", 1)), use_abstract_mesh(mesh):
                lowered = jax.jit(run).lower(x, *w)
            lowered.compile()
            row = described(name, m, K, N, kind, group, activations)
            found = {"chip": chip, "tile": list(tile), "basis": "compiled"}
            found["instructions"] = instructions(folder)
            if chip in CLOCK_HZ:
                seconds = estimate(found, described_as.chip, m, K, N, kind)
                found["estimate_us"] = 1e6 * seconds
            yield {**row, **found}


def estimate(
    found: dict[str, Any], chip: Any, m: int, K: int, N: int, kind: str
) -> float:
    """Seconds, by the rule that the module's text states."""
    rows, outputs, inputs = found["tile"]
    piece_bytes = outputs * inputs * (0.5 if kind == "int4" else 1)
    row_bytes = rows * inputs if m > 128 else 0
    memory_s = chip.hbm_bytes_per_s * chip.hbm_efficiency / CORES[chip.name]
    read_s = (piece_bytes + row_bytes) / memory_s
    run_s = found["instructions"] / CLOCK_HZ[chip.name]
    steps = math.ceil(m / rows) * math.ceil(N / outputs) * (K // inputs)
    steps = math.ceil(steps / CORES[chip.name])
    return read_s + steps * (max(read_s, run_s + STEP_S))


def instructions(folder: str) -> int:
    """Of the kernel that was compiled last; the folder is left empty."""
    pattern = f"{folder}/*int8_matmul*schedule-analysis_final_bundles.txt"
    texts = [Path(path).read_text() for path in glob.glob(pattern)]
    for path in glob.glob(f"{folder}/*"):
        Path(path).unlink()
    (text,) = texts
    (count,) = re.findall(r"total scheduled bundles:\s+(\d+)", text)
    return int(count)


def tiles(
    m: int, K: int, N: int, kind: str, group: int | None, activations: str
) -> list[Any]:
    """The rule's tile first; then half and twice its outputs, its inputs or rows."""
    from llmos_jax.kernels.int8_matmul import blocks, pallas_tpu

    x, w = given(m, K, N, kind, group, None)
    product = pallas_tpu._product_of(x, w, activations, False)
    first = blocks.ruled(product)
    found = [first]
    for factor in (0.5, 2):
        outputs = int(first.outputs * factor) // 128 * 128
        if 128 <= outputs <= N:
            found.append(first._replace(outputs=outputs))
        inputs = int(first.inputs * factor)
        fits = K % inputs == 0 and (inputs % product.least == 0 or inputs == K)
        if m > blocks.FEW_ROWS and fits:
            found.append(first._replace(inputs=inputs))
    fit = blocks.VMEM_BYTES
    return [tile for tile in found if blocks.vmem_bytes(tile, product) <= fit]


def cases(matrices: dict[str, Any], kinds: list[Any], rows: Any, only: str) -> Any:
    """Every combination whose description has `only` in it."""
    for matrix in matrices.items():
        for kind in kinds:
            for m in rows:
                row = described(matrix[0], m, *matrix[1], *kind)
                if only in " ".join(str(value) for value in row.values()):
                    yield matrix, kind, m


def described(
    name: str, m: int, K: int, N: int, kind: str, group: int | None, activations: str
) -> dict[str, Any]:
    """What every row begins with."""
    label = f"{kind}-{activations}" + (f"-{group}" if group else "")
    return {"matrix": name, "kind": label, "rows": m, "K": K, "N": N}


def kernel(pallas_tpu: Any, activations: str, tile: Any) -> Any:
    """The kernel of a tile, as a function of rows, values and scale."""
    from llmos_jax.kernels.int8_matmul import Weight

    def run(x: Any, values: Any, scale: Any) -> Any:
        return pallas_tpu.int8_matmul(
            x, Weight(values, scale), activations=activations, blocks=tile
        )

    return run


def given(
    m: int, K: int, N: int, kind: str, group: int | None, device: Any
) -> tuple[Any, Any]:
    """Rows and matrix, as shapes on a device."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import SingleDeviceSharding

    from llmos_jax.kernels.int8_matmul import Weight

    where = SingleDeviceSharding(device) if device is not None else None

    def shape(sizes: tuple[int, ...], dtype: str) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype), sharding=where)

    values = shape((K // 2 if kind == "int4" else K, N), STORED[kind])
    scale = shape((N,), "float32") if not group else shape((K // group, N), "bfloat16")
    return shape((m, K), "bfloat16"), Weight(values, scale)


def zeros(item: Any) -> Any:
    """An array of a shape; what is in it changes no time."""
    import jax.numpy as jnp

    return jnp.zeros(item.shape, item.dtype)


def np_of(x: Any) -> Any:
    import numpy as np

    return np.asarray(x)


def seconds(run: Any, *arrays: Any) -> float:
    """The median of 15 calls, after two."""
    import jax

    run = jax.jit(run)
    taken = []
    for _ in range(17):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[2:])


def write(rows: list[dict[str, Any]]) -> None:
    """Put the best tile of each case, if it gains, into the table's rows of this chip
    and keep the header and other chips' rows."""
    text = TABLE.read_text()
    header = text.split("[[blocks]]")[0].rstrip()
    import tomllib

    known = {
        (row["chip"], row["kind"], row["rows"], row["K"], row["N"]): row
        for row in tomllib.loads(text).get("blocks", [])
    }
    by_case: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if "estimate_us" in row:
            place = (row["chip"], row["kind"], row["rows"], row["K"], row["N"])
            by_case.setdefault(place, []).append(row)
    for place, found in by_case.items():
        best = min(found, key=lambda row: row["estimate_us"])
        known.pop(place, None)
        if best["estimate_us"] < (1 - GAIN) * found[0]["estimate_us"]:
            known[place] = best
    lines = [header]
    for place, row in sorted(known.items()):
        chip, kind, m, K, N = place
        lines.append(
            f'\n[[blocks]]\nchip = "{chip}"\nkind = "{kind}"\nrows = {m}\nK = {K}\n'
            f'N = {N}\ntile = {row["tile"]}\nbasis = "{row["basis"]}"'
        )
    TABLE.write_text("\n".join(lines) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Aligned columns."""
    if not rows:
        return "nothing was asked for"
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([shown(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        for row in cells
    )


def shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
