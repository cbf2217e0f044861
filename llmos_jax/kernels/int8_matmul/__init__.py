"""Rows times a matrix that is stored in few bits, per output or per group of inputs."""

from llmos_jax.kernels.int8_matmul.api import IMPLEMENTATIONS, int8_matmul
from llmos_jax.kernels.int8_matmul.reference import Activations, quantized_rows
from llmos_jax.kernels.int8_matmul.weight import (
    FLOAT8,
    Kind,
    Weight,
    dequantized,
    nearest_numbers,
    nearest_table,
    packed_int4,
    quantized,
    quantized_table,
    rounded,
    spread,
    whole,
)

__all__ = [
    "FLOAT8",
    "IMPLEMENTATIONS",
    "Activations",
    "Kind",
    "Weight",
    "dequantized",
    "int8_matmul",
    "nearest_numbers",
    "nearest_table",
    "packed_int4",
    "quantized",
    "quantized_rows",
    "quantized_table",
    "rounded",
    "spread",
    "whole",
]
