"""Models in Flax NNX: a spec, and a module whose parameters name their axes."""

from llmos_jax.models.annotate import (
    Axes,
    Stored,
    along,
    annotate,
    annotated_by,
    mesh_axes_of,
    per_shard,
    ways_of,
)
from llmos_jax.models.attention import token_order
from llmos_jax.models.cache import KVCache, empty_cache, empty_pages
from llmos_jax.models.classes import Noise
from llmos_jax.models.decoder import Decoder, Pass, Stack
from llmos_jax.models.layers import capped
from llmos_jax.models.moe import Routing
from llmos_jax.models.project import observed_by
from llmos_jax.models.skeleton import Params, Skeleton, param_table, skeleton
from llmos_jax.models.weight import floats

__all__ = [
    "Axes",
    "Decoder",
    "KVCache",
    "Noise",
    "Params",
    "Pass",
    "Routing",
    "Skeleton",
    "Stack",
    "Stored",
    "along",
    "annotate",
    "annotated_by",
    "capped",
    "empty_cache",
    "empty_pages",
    "floats",
    "mesh_axes_of",
    "observed_by",
    "param_table",
    "per_shard",
    "skeleton",
    "token_order",
    "ways_of",
]
