"""python -m llmos_jax.compress CONFIG|MODEL: a smaller model, and what that costs.

MODEL is a run folder, a checkpoint, a Hugging Face folder or a GGUF file; a CONFIG
names one as its `model`. [compress] says what is made, for example --set
compress.weights=int4 --set compress.group=32 --set compress.method=gptq. The result is
compared with its source on the text that `evaluate` would take; then the checkpoint and
report.json are written to --out.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from llmos_jax import driver
from llmos_jax.cli import Answer, arguments_of, render, run_verb


def main(argv: Sequence[str] | None = None) -> int:
    """Compress, and print sizes and distances."""
    parser = arguments_of("compress", __doc__ or "")
    parser.add_argument(
        "name",
        metavar="CONFIG|MODEL",
        help="a TOML file or a name under configs/, or whatever has weights",
    )
    parser.add_argument("--out", metavar="DIR", help="a new folder (compress.out)")

    def answer(arguments: Any) -> Answer:
        overrides = list(arguments.overrides)
        if arguments.out is not None:
            overrides.append(f"compress.out={arguments.out}")
        report = driver.compress(arguments.name, overrides)
        return Answer(text=render.table(_figures(report)), json=report)

    return run_verb(parser, argv, answer)


SHOWN = (
    "model out made params params_before shape zeros bytes bytes_before "
    "bits_per_weight decode_ms decode_ms_before perplexity perplexity_before kld "
    "same_top1 evaluated_tokens calibration_tokens"
).split()


def _figures(report: dict[str, Any]) -> dict[str, Any]:
    """What a person wants to see at once, and where the rest is."""
    shown = {name: _words(report[name]) for name in SHOWN if name in report}
    errors = report.get("errors", {})
    means = {path: sum(of) / len(of) for path, of in errors.items()}
    if means:
        worst = max(means, key=lambda path: means[path])
        shown["worst_matrix"] = f"{worst} (off by {means[worst]:.2%}, mean of layers)"
    for row in report.get("chain", ()):
        few = ("params", "bytes", "perplexity", "kld")
        shown[row["link"]] = {name: row[name] for name in few if name in row}
        shown[row["link"]] = _words(shown[row["link"]])
    return {
        **shown,
        "seconds": sum(report["seconds"].values()),
        "report": f"{report['out']}/report.json",
    }


def _words(figure: Any) -> Any:
    """A figure in one line."""
    if not isinstance(figure, dict):
        return figure
    return ", ".join(f"{name} {value}" for name, value in figure.items())


if __name__ == "__main__":
    sys.exit(main())
