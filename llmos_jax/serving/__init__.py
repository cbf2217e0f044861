"""Turn a model and prompts into text."""

from llmos_jax.scheduling import NOT_A_NUMBER, Sampling
from llmos_jax.serving.classifier import open_classifier
from llmos_jax.serving.engine import MAX_QUEUE, Engine, Options
from llmos_jax.serving.followers import follow
from llmos_jax.serving.forward import DecoderForward, Forward, open_forward
from llmos_jax.serving.generation import Completion, Generator
from llmos_jax.serving.opening import (
    Opened,
    Placement,
    Ready,
    ReadyMade,
    identity_of,
    make_ready,
    open_engine,
)
from llmos_jax.serving.planned import (
    lower_decode_step,
    lower_prefill_step,
    repeated_params,
    with_repeated_heads,
)
from llmos_jax.serving.planned_pages import (
    lower_paged_chunk,
    lower_paged_decode,
    serves_pages,
)
from llmos_jax.serving.portable import PLATFORMS, Portable, portable_programs
from llmos_jax.serving.runner import Runner
from llmos_jax.serving.sampler import (
    Needs,
    SamplingRows,
    rows_of,
    sample,
)
from llmos_jax.serving.state import EngineState, Limits
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
    "Chunk",
    "Completion",
    "DecodeState",
    "DecoderForward",
    "Engine",
    "EngineState",
    "Forward",
    "Generator",
    "Limits",
    "MAX_QUEUE",
    "MOST_STEPS",
    "NOT_A_NUMBER",
    "NO_TOKEN",
    "Needs",
    "Opened",
    "Options",
    "PLATFORMS",
    "Placement",
    "Portable",
    "Programs",
    "Ready",
    "ReadyMade",
    "Row",
    "Rows",
    "Runner",
    "Sampling",
    "SamplingRows",
    "empty_state",
    "follow",
    "identity_of",
    "lower_decode_step",
    "lower_paged_chunk",
    "lower_paged_decode",
    "lower_prefill_step",
    "make_ready",
    "open_classifier",
    "open_engine",
    "open_forward",
    "portable_programs",
    "programs",
    "repeated_params",
    "rows_of",
    "rows_on_device",
    "sample",
    "serves_pages",
    "with_repeated_heads",
]
