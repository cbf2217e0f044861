"""Models in Flax NNX: a spec, and a module whose parameters name their axes."""

from llmos_jax.models.annotate import annotate, annotated_by
from llmos_jax.models.cache import KVCache, empty_cache
from llmos_jax.models.decoder import Decoder
from llmos_jax.models.remat import REMAT_POLICIES
from llmos_jax.models.skeleton import Params, Skeleton, param_table, skeleton

__all__ = [
    "REMAT_POLICIES",
    "Decoder",
    "KVCache",
    "Params",
    "Skeleton",
    "annotate",
    "annotated_by",
    "empty_cache",
    "param_table",
    "skeleton",
]
