"""Read, check and expand configs: TOML and `--set` in, typed frozen sections out."""

from llmos_jax.config.build import to_toml
from llmos_jax.config.load import (
    Loaded,
    load_config,
    load_model,
    load_prices,
    model_names,
    override_config,
)
from llmos_jax.config.schema import (
    BatchSection,
    ClassifySection,
    CompressSection,
    DataSection,
    LoraSection,
    PlanSection,
    RunConfig,
    ServeSection,
    SyncSection,
)

__all__ = [
    "BatchSection",
    "ClassifySection",
    "CompressSection",
    "DataSection",
    "Loaded",
    "LoraSection",
    "PlanSection",
    "RunConfig",
    "ServeSection",
    "SyncSection",
    "load_config",
    "load_model",
    "load_prices",
    "model_names",
    "override_config",
    "to_toml",
]
