"""python -m llmos_jax.train [CONFIG]: train a model from a config.

Makes run.dir with checkpoints, metrics, report.html and report.json. Running again on
the same folder resumes; a finished run says so and changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, add_config, arguments_of, render, run_verb
from llmos_jax.config import load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Train, and print where everything lies."""
    parser = arguments_of("train", __doc__ or "")
    add_config(parser, default="quickstart")

    def answer(arguments: Any) -> Answer:
        loaded = load_config(arguments.config, arguments.overrides)
        report = driver.train(loaded.config)
        return Answer(text=render.train_summary(report), json=report)

    return run_verb(parser, argv, answer)


if __name__ == "__main__":
    sys.exit(main())
