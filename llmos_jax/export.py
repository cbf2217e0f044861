"""python -m llmos_jax.export MODEL --out FOLDER: a Bundle, ready to be served.

A Bundle holds the weights as they are served (--set serve.weight_dtype=int8 rounds
them), the tokenizer and its template, the plan, programs, and where all of it comes
from; it checks itself. --to hf or --to gguf writes what other programs read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, add_model, arguments_of, render, run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Export, and print what was written."""
    parser = arguments_of("export", __doc__ or "")
    add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a new folder, or a .gguf file"
    )
    parser.add_argument(
        "--to",
        choices=["bundle", "hf", "gguf"],
        default="bundle",
        help="the form of PATH (default: bundle)",
    )

    def answer(arguments: Any) -> Answer:
        report = driver.export(
            arguments.model, arguments.out, arguments.overrides, form=arguments.to
        )
        shown = {key: x for key, x in report.items() if not isinstance(x, dict)}
        return Answer(text=render.table(shown), json=report)

    return run_verb(parser, argv, answer)


if __name__ == "__main__":
    sys.exit(main())
