"""Turn a model and prompts into text."""

from llmos_jax.serving.forward import DecoderForward, Forward, open_forward
from llmos_jax.serving.generation import Completion, Generator
from llmos_jax.serving.planned import (
    lower_decode_step,
    lower_prefill_step,
    repeated_params,
    with_repeated_heads,
)
from llmos_jax.serving.runner import Runner
from llmos_jax.serving.sampler import (
    NOT_A_NUMBER,
    Needs,
    Sampling,
    SamplingRows,
    rows_of,
    sample,
)
from llmos_jax.serving.step import (
    MOST_STEPS,
    NO_TOKEN,
    Chunk,
    DecodeState,
    Programs,
    Row,
    Rows,
    empty_state,
    programs,
    rows_on_device,
)

__all__ = [
    "MOST_STEPS",
    "NOT_A_NUMBER",
    "NO_TOKEN",
    "Chunk",
    "Completion",
    "DecodeState",
    "DecoderForward",
    "Forward",
    "Generator",
    "Needs",
    "Programs",
    "Row",
    "Rows",
    "Runner",
    "Sampling",
    "SamplingRows",
    "empty_state",
    "lower_decode_step",
    "lower_prefill_step",
    "open_forward",
    "programs",
    "repeated_params",
    "rows_of",
    "rows_on_device",
    "sample",
    "with_repeated_heads",
]
