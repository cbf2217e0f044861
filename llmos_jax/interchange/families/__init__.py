"""A family is a row of facts: what its config.json says, and what our spec calls it.

`spec_of` reads the config.json of any known `model_type`; `config_of` writes one that
transformers 5 loads. What a config asks for and our models cannot do is an error.
"""

from llmos_jax.interchange.families.read import spec_of
from llmos_jax.interchange.families.table import FAMILIES, Family
from llmos_jax.interchange.families.write import architecture_of, config_of

__all__ = ["FAMILIES", "Family", "architecture_of", "config_of", "spec_of"]
