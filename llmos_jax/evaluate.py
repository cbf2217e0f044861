"""python -m llmos_jax.evaluate MODEL: score a model on text.

The text is data.test, else data.validation (--set data.test=FILE), else the part that
the model's own run held out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, add_model, arguments_of, render, run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Score, and print perplexity and bits per byte."""
    parser = arguments_of("evaluate", __doc__ or "")
    add_model(parser)

    def answer(arguments: Any) -> Answer:
        report = driver.evaluate(arguments.model, arguments.overrides)
        return Answer(text=render.table(report), json=report)

    return run_verb(parser, argv, answer)


if __name__ == "__main__":
    sys.exit(main())
