"""Read and write how a config.json says what rotation is like.

transformers 5 keeps all of it in `rope_parameters` (for Gemma 3 one for each kind of
layer); older files have `rope_theta`, `rope_scaling` and `rope_local_base_freq`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec, RopeScaling

if TYPE_CHECKING:
    from llmos_jax.interchange.families.read import Known

_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


class Rope(NamedTuple):
    """The fields of ModelSpec that are about rotation."""

    theta: float
    scaling: RopeScaling | None
    local_theta: float | None


def read_rope(known: Known, model_type: str) -> Rope:
    """Return what both kinds of files say.

    Raises:
        ConfigError: a rope type other than default, linear and llama3, or values that
            do not belong to it.
    """
    older, newer = known.values.get("rope_scaling"), known.values.get("rope_parameters")
    if not isinstance(older, dict | None) or not isinstance(newer, dict | None):
        raise known.wrong("rope_parameters", "a table")
    older, newer = older or {}, newer or {}
    if model_type != "gemma3_text":
        whole = older or newer
        if any(isinstance(value, dict) for value in whole.values()):
            raise known.wrong("rope_parameters", "one table for all layers")
        theta = _theta(known, whole, "rope_theta")
        return Rope(theta, _scaling(known, whole), None)
    nested = {"full_attention", "sliding_attention"} & newer.keys()
    whole = newer.get("full_attention") or {} if nested else newer
    local = newer.get("sliding_attention") or {}
    if not isinstance(whole, dict) or not isinstance(local, dict):
        raise known.wrong("rope_parameters", "a table for each kind of layer")
    if _scaling(known, local) is not None:
        raise known.wrong("rope_parameters", "sliding_attention with rope_type default")
    whole = {**whole, **older}
    return Rope(
        _theta(known, whole, "rope_theta"),
        _scaling(known, whole),
        _theta(known, local, "rope_local_base_freq"),
    )


def write_rope(spec: ModelSpec, nested: bool) -> dict[str, Any]:
    """Return `rope_parameters`; `nested` as Gemma 3 has them."""
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    scaling = spec.rope_scaling
    if scaling is not None:
        whole |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is not None and scaling.kind == "llama3":
        whole |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        }
    if not nested:
        return whole
    local = spec.rope_theta if spec.local_rope_theta is None else spec.local_rope_theta
    sliding = {"rope_type": "default", "rope_theta": local}
    return {"full_attention": whole, "sliding_attention": sliding}


def _theta(known: Known, parameters: dict[str, Any], key: str) -> float:
    value = parameters.get("rope_theta", known.values.get(key, 10000.0))
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ConfigError(
            f"model {known.name}: its config.json has {key} = {value!r}; wanted a "
            "positive number."
        )
    return float(value)


def _scaling(known: Known, parameters: dict[str, Any]) -> RopeScaling | None:
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _KEYS:
        raise ConfigError(
            f"model {known.name}: its config.json has rope_type = {kind!r}, which is "
            f"not supported; {', '.join(_KEYS)} are."
        )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ConfigError(
            f"model {known.name}: its config.json has partial_rotary_factor = "
            f"{parameters['partial_rotary_factor']!r}, which is not supported; only 1."
        )
    values = {key: parameters.get(key) for key in _KEYS[kind]}
    if values.get("original_max_position_embeddings", 0) is None:
        longest = known.size("max_position_embeddings")
        values["original_max_position_embeddings"] = longest
    numbers = {}
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(
                f"model {known.name}: rope_type = {kind!r} of its config.json has "
                f"{key} = {value!r}; wanted a positive number."
            )
        numbers[key] = float(value)
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=numbers["factor"])
    return RopeScaling(
        kind="llama3",
        factor=numbers["factor"],
        low_freq_factor=numbers["low_freq_factor"],
        high_freq_factor=numbers["high_freq_factor"],
        original_max_seq_len=int(numbers["original_max_position_embeddings"]),
    )
