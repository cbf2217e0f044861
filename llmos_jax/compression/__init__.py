"""A checkpoint in, a smaller one out: passes over a model's parameters."""

from llmos_jax.compression.calibrate import Moments, Seen, Walk
from llmos_jax.compression.gptq import gptq
from llmos_jax.compression.masks import Masked, check_masks, check_prunable, mask
from llmos_jax.compression.prune import Candidate, Cost, Predict, Pruned, prune
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
from llmos_jax.compression.shapes import Shape, check_shapes, multiple_of, shapes
from llmos_jax.compression.smooth import smoothed

__all__ = [
    "Candidate",
    "Clock",
    "Cost",
    "Errors",
    "How",
    "Masked",
    "Moments",
    "Predict",
    "Pruned",
    "Quantized",
    "Seen",
    "Shape",
    "Walk",
    "check_distance",
    "check_masks",
    "check_prunable",
    "check_shapes",
    "gptq",
    "how_of",
    "mask",
    "multiple_of",
    "nearest",
    "num_bytes",
    "prune",
    "quantize",
    "quantized_spec",
    "shapes",
    "sizes",
    "smoothed",
    "write_report",
]
