"""Read, check and expand configs: TOML and `--set` in, typed frozen sections out."""

from llmos_jax.config.build import to_toml
from llmos_jax.config.load import Loaded, load_config, load_model, model_names
from llmos_jax.config.schema import DataSection, RunConfig

__all__ = [
    "DataSection",
    "Loaded",
    "RunConfig",
    "load_config",
    "load_model",
    "model_names",
    "to_toml",
]
