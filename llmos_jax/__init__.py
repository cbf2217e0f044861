"""llmos_jax: an operating system for large language models, shaped like a compiler.

A model, a machine and a workload go in; a planner decides how to split the work; the
plan is lowered to compiled JAX programs; the programs train, compress, export and
serve.
"""

__version__ = "0.1.0"
