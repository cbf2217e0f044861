"""What the front doors share: arguments, tables, JSON, exit codes. The only `print`."""

from llmos_jax.cli import render
from llmos_jax.cli.arguments import add_config, add_model, arguments_of
from llmos_jax.cli.door import Answer, run_verb, speak

__all__ = [
    "Answer",
    "add_config",
    "add_model",
    "arguments_of",
    "render",
    "run_verb",
    "speak",
]
