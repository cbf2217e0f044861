"""python -m llmos_jax.convert MODEL --out PATH: the same model in another form.

MODEL is a Hugging Face folder, a GGUF file, a run folder or a checkpoint. Foreign
models become a checkpoint of ours, ours a Hugging Face folder; --to names another form.
LoRA factors are merged (--to peft writes them alone). What was written is read back,
and must answer as the model does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, add_model, arguments_of, render, run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Convert, and print how near the logits are."""
    parser = arguments_of("convert", __doc__ or "")
    add_model(parser)
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="a new folder, or a .gguf file"
    )
    parser.add_argument(
        "--to",
        choices=["checkpoint", "hf", "gguf", "peft"],
        help="the form of PATH (default: by its name and by what MODEL is)",
    )
    parser.add_argument(
        "--kind",
        choices=["f32", "f16", "q8_0"],
        default="f16",
        help="of the weights in a GGUF file (default: f16)",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        help="of the weights in a folder (default: as they are stored)",
    )

    def answer(arguments: Any) -> Answer:
        report = driver.convert(
            arguments.model,
            arguments.out,
            arguments.overrides,
            form=arguments.to,
            kind=arguments.kind,
            dtype=arguments.dtype,
        )
        return Answer(text=render.table(report), json=report)

    return run_verb(parser, argv, answer)


if __name__ == "__main__":
    sys.exit(main())
