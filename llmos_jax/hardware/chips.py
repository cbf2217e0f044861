"""Turn a chip's name into facts, each with its source.

All figures are per CHIP; a tpu7x chip is two JAX devices, every other chip one (v4 and
v5p run as one megacore). `hbm_bytes` is what a program may use, not what is soldered
on: for TPUs the limit that the compiler prints when a program does not fit.

Sources, by the names used below:
  tpu_info    jax, jax/_src/tpu_info.py (2026-08): peak FLOP/s and HBM bandwidth
  book        scaling-book, tpus.md and the GPU chapter (2025-02): ICI, DCN, NVLink
  microbench  AI-Hypercomputer/accelerator-microbenchmarks, its logs: measured ceilings
  compiler    the text `Used X of Y hbm` of XLA's CompileTimeHbmOom
  torchtitan  torchtitan/tools/utils.py, get_peak_flops
  autop       meta-pytorch/autoparallel: GPU work reaches 0.7 of its peak
  fit         published training steps: tools/bench/planner_time.py --fit, which drew
              `matmul_efficiency` of TPUs to 0.90 (microbench: 827 of 918 TFLOP/s on
              v6e) and of tpu7x to 0.83 (956 of 1153 per core)

Known lies: one efficiency per resource, whatever the size of the message. Memory and
links were measured on v6e and tpu7x only; the other TPUs borrow from them, and GPU
figures are for the SXM boards with 80 GB (A100, H100).
"""

from __future__ import annotations

from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.ir.topology import Chip
from llmos_jax.units import GIB

# microbench, v6e: HBM copy at 1360 of 1640 GB/s.
_V6E_HBM = 0.83
# microbench, v6e-256: psum at 235.8 GB/s; four links of 90 GB/s each allow 360.
_V6E_LINK = 0.65
# microbench, tpu7x: copy at 6.42 of 7.40 TB/s, all-gather on 2x2x1 at 178.8 GB/s where
# two links of 100 GB/s allow 200.
_V7X_HBM, _V7X_LINK = 0.87, 0.89
# Not measured: memory halfway between the two that were; links as on v6e, which also
# suits v5e's decode table (tools/bench/planner_decode.py) better than halfway, 0.77.
_TPU_HBM, _TPU_LINK = 0.85, _V6E_LINK
# autop: compute and memory at 0.7 of peak; book: NVLink gives 370 of 450 GB/s.
_GPU_SHARE, _NVLINK = 0.70, 0.82

CHIPS: dict[str, Chip] = {
    "v4": Chip(
        name="v4",
        vendor="tpu",
        devices_per_chip=1,
        peak_flops_per_s={"bfloat16": 2.75e14},
        hbm_bytes=30.75 * GIB,
        hbm_bytes_per_s=1.23e12,
        link_bytes_per_s=4.5e10,
        torus_dims=3,
        dcn_bytes_per_s=25e9 / 4,
        matmul_efficiency=0.848,
        hbm_efficiency=_TPU_HBM,
        link_efficiency=_TPU_LINK,
        source="tpu_info; usable HBM: compiler (MaxText PR 4117); DCN: book, 25 GB/s "
        "per host of 4; matmul: fit; the rest borrowed from v6e and tpu7x",
    ),
    "v5e": Chip(
        name="v5e",
        vendor="tpu",
        devices_per_chip=1,
        peak_flops_per_s={"bfloat16": 1.97e14, "int8": 3.94e14, "int4": 7.88e14},
        hbm_bytes=15.75 * GIB,
        hbm_bytes_per_s=8.2e11,
        link_bytes_per_s=4.5e10,
        torus_dims=2,
        dcn_bytes_per_s=25e9 / 8,
        matmul_efficiency=0.967,
        hbm_efficiency=_TPU_HBM,
        link_efficiency=_TPU_LINK,
        source="tpu_info; usable HBM: compiler; DCN: book, 25 GB/s per host of 8; "
        "matmul: fit; the rest borrowed from v6e and tpu7x",
    ),
    "v5p": Chip(
        name="v5p",
        vendor="tpu",
        devices_per_chip=1,
        peak_flops_per_s={"bfloat16": 4.59e14, "int8": 9.18e14, "int4": 1.84e15},
        hbm_bytes=95.74 * GIB,
        hbm_bytes_per_s=2.46e12,
        link_bytes_per_s=9e10,
        torus_dims=3,
        dcn_bytes_per_s=50e9 / 8,
        matmul_efficiency=0.909,
        hbm_efficiency=_TPU_HBM,
        link_efficiency=_TPU_LINK,
        source="tpu_info (Cloud's page says 2765 GB/s of HBM); usable HBM: compiler, "
        "'of 95.74G hbm'; DCN: Cloud's v5p page, 50 Gb/s per chip",
    ),
    "v6e": Chip(
        name="v6e",
        vendor="tpu",
        devices_per_chip=1,
        peak_flops_per_s={
            "bfloat16": 9.2e14,
            "float8": 9.2e14,
            "int8": 1.84e15,
            "int4": 3.68e15,
        },
        hbm_bytes=31.25 * GIB,
        hbm_bytes_per_s=1.64e12,
        link_bytes_per_s=9e10,
        torus_dims=2,
        dcn_bytes_per_s=100e9 / 8,
        matmul_efficiency=0.841,
        hbm_efficiency=_V6E_HBM,
        link_efficiency=_V6E_LINK,
        matmul_tile=256,
        host_bytes_per_s=3.2e10,
        source="tpu_info; usable HBM: compiler; DCN: Cloud's v6e page, 100 Gb/s per "
        "chip; matmul: fit; other efficiencies: microbench; PCIe: book",
    ),
    "tpu7x": Chip(
        name="tpu7x",
        vendor="tpu",
        devices_per_chip=2,
        peak_flops_per_s={"bfloat16": 2.307e15, "float8": 4.614e15},
        hbm_bytes=2 * 94.75 * GIB,
        hbm_bytes_per_s=7.4e12,
        link_bytes_per_s=1e11,
        torus_dims=3,
        dcn_bytes_per_s=100e9 / 8,
        matmul_efficiency=0.845,
        hbm_efficiency=_V7X_HBM,
        link_efficiency=_V7X_LINK,
        matmul_tile=256,
        source="tpu_info and microbench core/system.py; usable HBM: compiler, "
        "'of 94.75G hbm' per core; link: 1200 GB/s per chip over six links both ways",
    ),
    "a100": Chip(
        name="a100",
        vendor="gpu",
        devices_per_chip=1,
        peak_flops_per_s={"bfloat16": 3.12e14, "float32": 1.56e14, "int8": 6.24e14},
        hbm_bytes=80e9,
        hbm_bytes_per_s=2.0e12,
        link_bytes_per_s=3.0e11,
        torus_dims=0,
        dcn_bytes_per_s=25e9,
        matmul_efficiency=_GPU_SHARE,
        hbm_efficiency=_GPU_SHARE,
        link_efficiency=_NVLINK,
        source="torchtitan; NVIDIA A100 datasheet (2021): HBM, NVLink, float32 = TF32; "
        "eight 200 Gb/s ports per node of 8",
    ),
    "h100": Chip(
        name="h100",
        vendor="gpu",
        devices_per_chip=1,
        peak_flops_per_s={
            "bfloat16": 9.89e14,
            "float32": 4.94e14,
            "int8": 1.98e15,
            "float8": 1.98e15,
        },
        hbm_bytes=80e9,
        hbm_bytes_per_s=3.35e12,
        link_bytes_per_s=4.5e11,
        torus_dims=0,
        dcn_bytes_per_s=50e9,
        matmul_efficiency=_GPU_SHARE,
        hbm_efficiency=_GPU_SHARE,
        link_efficiency=_NVLINK,
        source="torchtitan; NVIDIA H100 datasheet (2022): HBM, float32 = TF32; book: "
        "NVLink 450 GB/s, node egress 400 GB/s",
    ),
    "h200": Chip(
        name="h200",
        vendor="gpu",
        devices_per_chip=1,
        peak_flops_per_s={
            "bfloat16": 9.89e14,
            "float32": 4.94e14,
            "int8": 1.98e15,
            "float8": 1.98e15,
        },
        hbm_bytes=141e9,
        hbm_bytes_per_s=4.8e12,
        link_bytes_per_s=4.5e11,
        torus_dims=0,
        dcn_bytes_per_s=50e9,
        matmul_efficiency=_GPU_SHARE,
        hbm_efficiency=_GPU_SHARE,
        link_efficiency=_NVLINK,
        source="torchtitan; book, GPU chapter; float32 = TF32 as on H100",
    ),
    "b200": Chip(
        name="b200",
        vendor="gpu",
        devices_per_chip=1,
        peak_flops_per_s={
            "bfloat16": 2.25e15,
            "float32": 1.1e15,
            "float8": 4.5e15,
            "float4": 9e15,
        },
        hbm_bytes=192e9,
        hbm_bytes_per_s=8.0e12,
        link_bytes_per_s=9.0e11,
        torus_dims=0,
        dcn_bytes_per_s=50e9,
        matmul_efficiency=_GPU_SHARE,
        hbm_efficiency=_GPU_SHARE,
        link_efficiency=_NVLINK,
        source="torchtitan; book, GPU chapter; NVIDIA HGX B200 page (2024): "
        "float32 = TF32",
    ),
    # NOMINAL, one host core per device: simulated devices share cores and memory, so a
    # prediction for `cpu` ranks ways to run; it is not a speed.
    "cpu": Chip(
        name="cpu",
        vendor="cpu",
        devices_per_chip=1,
        peak_flops_per_s={"float32": 9.6e10, "bfloat16": 9.6e10},
        hbm_bytes=8 * GIB,
        hbm_bytes_per_s=2.56e10,
        link_bytes_per_s=1.28e10,
        torus_dims=0,
        dcn_bytes_per_s=1.25e9,
        matmul_efficiency=0.5,
        hbm_efficiency=0.5,
        link_efficiency=0.5,
        source="nominal: two 256-bit FMA a cycle (Fog, microarchitecture.pdf, Haswell "
        "and later) at 3 GHz; one DDR4-3200 channel (JESD79-4), which a copy crosses "
        "twice; 10 GbE; half of each; RAM of this machine over its devices",
    ),
}
"""Every chip that can be planned for."""


def chip(name: str) -> Chip:
    """Return the facts of one chip, or raise ConfigError with the nearest name."""
    if name not in CHIPS:
        raise ConfigError(f"unknown chip {name!r}.{did_you_mean(name, CHIPS)}")
    return CHIPS[name]
