"""A checkpoint in, a smaller one out: passes over a model's parameters."""

from llmos_jax.compression.calibrate import Moments, Seen, Walk
from llmos_jax.compression.gptq import gptq
from llmos_jax.compression.quantize import (
    Errors,
    How,
    Quantized,
    how_of,
    quantize,
    quantized_spec,
)
from llmos_jax.compression.report import (
    Clock,
    check_distance,
    num_bytes,
    sizes,
    write_report,
)
from llmos_jax.compression.rounding import nearest
from llmos_jax.compression.smooth import smoothed

__all__ = [
    "Clock",
    "Errors",
    "How",
    "Moments",
    "Quantized",
    "Seen",
    "Walk",
    "check_distance",
    "gptq",
    "how_of",
    "nearest",
    "num_bytes",
    "quantize",
    "quantized_spec",
    "sizes",
    "smoothed",
    "write_report",
]
