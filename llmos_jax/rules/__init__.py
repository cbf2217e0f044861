"""Turn a sharding rules file and a mesh into the split of every array."""

from llmos_jax.rules.load import Axis, load_axes, load_rules
from llmos_jax.rules.resolve import (
    check_rules,
    resolve,
    resolve_activation,
    resolve_weight,
)

__all__ = [
    "Axis",
    "check_rules",
    "load_axes",
    "load_rules",
    "resolve",
    "resolve_activation",
    "resolve_weight",
]
