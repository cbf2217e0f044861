"""What making a model smaller came to: sizes, seconds, and whether it is near."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from llmos_jax.config.schema import CompressSection
from llmos_jax.errors import CompressError
from llmos_jax.ir import ParamTable
from llmos_jax.models import Params


def num_bytes(params: Params) -> dict[str, int]:
    """Bytes of parameters: of `all`, and of `layers`, `embed`, `final_norm`, `head`."""
    found: dict[str, int] = {}
    for path, x in sorted(params.items()):
        part = path.partition(".")[0]
        found[part] = found.get(part, 0) + x.nbytes
    return {"all": sum(found.values()), **found}


def sizes(table: ParamTable, before: dict[str, int], params: Params) -> dict[str, Any]:
    """Bytes before and after, and the bits of a weight with its share of scales.

    Args:
        table: the model in floating point.
        before: `num_bytes` of its parameters as they were stored.
        params: the smaller model's.
    """
    after = num_bytes(params)
    return {
        "bytes": after["all"],
        "bytes_before": before["all"],
        "bits_per_weight": 8 * after["all"] / table.num_params,
        "bytes_by_part": after,
        "bytes_before_by_part": before,
    }


class Clock:
    """Seconds that each part of the work took."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Say that a part is done."""
        now = time.monotonic()
        self.laps[name] = round(now - self._last, 1)
        self._last = now


def check_distance(
    kld: float, asked: CompressSection, made: str = "", remedy: str = ""
) -> None:
    """Refuse what is too far from its source.

    Args:
        kld: mean KL divergence in nats.
        asked: `max_kld`, and how it was quantized.
        made: what it is; empty: a model in few bits.
        remedy: what to try; empty: another way to quantize.

    Raises:
        CompressError: with both figures, and what to try.
    """
    if asked.max_kld is None or kld <= asked.max_kld:
        return
    made = made or f"model in {asked.weights}"
    raise CompressError(
        f"the {made} is {kld:.4g} nats from its source (mean KL "
        f"divergence), and compress.max_kld = {asked.max_kld:g}. Nothing was written. "
        f"Try {remedy or _remedy(asked)}, or allow more."
    )


def _remedy(asked: CompressSection) -> str:
    """What costs least to try, of all that was not."""
    if asked.method == "nearest":
        return "compress.method=gptq"
    if asked.activations != "none":
        return "compress.activations=none"
    if asked.weights == "int4" and (asked.group or 0) > 32:
        return "compress.group=32"
    if asked.weights != "int8":
        return "compress.weights=int8 without compress.group"
    if asked.group is None:
        return "compress.group=64"
    return "a longer calibration text (compress.sequences)"


def write_report(folder: Path, report: dict[str, Any]) -> dict[str, Any]:
    """Write report.json beside a checkpoint, whole or not at all, and return it."""
    text = json.dumps(report, indent=2) + "\n"
    path = folder / "report.json"
    fresh = path.with_name("report.json.part")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)
    return report
