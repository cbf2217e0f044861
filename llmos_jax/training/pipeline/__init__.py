"""Pipeline parallelism: the layers of a model spread over stages."""

from llmos_jax.training.pipeline.run import pipelined, pipelined_sums
from llmos_jax.training.pipeline.stage import Job

__all__ = ["Job", "pipelined", "pipelined_sums"]
