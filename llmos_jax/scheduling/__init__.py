"""Who runs next and where their keys and values lie: plain Python, without jax."""

from llmos_jax.scheduling.batching import Batching, Size, Sizes
from llmos_jax.scheduling.request import (
    MOST_ALTERNATIVES,
    FinishReason,
    Grammar,
    Hear,
    Likelihood,
    Progress,
    Request,
    Times,
)
from llmos_jax.scheduling.room import Room, doubling
from llmos_jax.scheduling.sampling import MOST_BIASES, Sampling
from llmos_jax.scheduling.scheduler import Counters, Scheduler
from llmos_jax.scheduling.sequence import Sequence
from llmos_jax.scheduling.variant import (
    DRAWN,
    FULL,
    PLAIN,
    VARIANTS,
    Variant,
    variant_of,
)
from llmos_jax.scheduling.work import NO_TOKEN, NOT_A_NUMBER, Drawn, Part, Work

__all__ = [
    "Batching",
    "Counters",
    "DRAWN",
    "Drawn",
    "FULL",
    "FinishReason",
    "Grammar",
    "Hear",
    "Likelihood",
    "MOST_ALTERNATIVES",
    "MOST_BIASES",
    "NOT_A_NUMBER",
    "NO_TOKEN",
    "PLAIN",
    "Part",
    "Progress",
    "Request",
    "Room",
    "Sampling",
    "Scheduler",
    "Sequence",
    "Size",
    "Sizes",
    "Times",
    "VARIANTS",
    "Variant",
    "Work",
    "doubling",
    "variant_of",
]
