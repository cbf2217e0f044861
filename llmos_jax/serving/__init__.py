"""Turn a model and a prompt into text."""

from llmos_jax.serving.generation import Completion, Generator
from llmos_jax.serving.sampler import Sampling, sample

__all__ = ["Completion", "Generator", "Sampling", "sample"]
