"""python -m llmos_jax.doctor [MODEL]: say what is here, what works, what is missing.

With a run folder or checkpoint, also say what it holds, and hold every file of it
against its checksum: exit code 1 if one is damaged.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, arguments_of, render, run_verb
from llmos_jax.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Inspect, and print one line per check."""
    parser = arguments_of("doctor", __doc__ or "")
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="whatever has weights; it is checked"
    )

    def answer(arguments: Any) -> Answer:
        if arguments.overrides:
            raise ConfigError("doctor reads no config; leave --set out.")
        report = driver.doctor(arguments.model)
        return Answer(
            text=render.doctor(report), json=report, failure=render.damage(report)
        )

    return run_verb(parser, argv, answer)


if __name__ == "__main__":
    sys.exit(main())
