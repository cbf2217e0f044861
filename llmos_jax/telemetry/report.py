"""Turn a finished run into report.json (figures for scripts) and report.html (a page).

The page is one self-contained file: styles and figures are inside it, nothing is
fetched. The curves come from the run folder's own metrics.jsonl.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from llmos_jax.errors import LlmosError
from llmos_jax.ir import Plan, ReportRow
from llmos_jax.telemetry.confusion import Confusion, class_rows, confusion_figure
from llmos_jax.telemetry.figures import (
    Plot,
    loss_figure,
    memory_figure,
    throughput_figure,
)
from llmos_jax.telemetry.goodput import PHASES
from llmos_jax.telemetry.metrics import read_metrics
from llmos_jax.units import format_seconds, format_si

_BASELINES = {"gzip_bits_per_byte": "gzip", "xz_bits_per_byte": "xz"}
_HEADLINES = 6


def write_report(
    folder: Path,
    *,
    values: dict[str, Any],
    rows: Sequence[ReportRow],
    plan: Plan,
    config_toml: str,
    environment: dict[str, str],
    samples: Sequence[tuple[str, str]],
    confusion: Confusion | None = None,
) -> None:
    """Write report.json, report.html and plots/*.png into a run folder.

    Args:
        folder: the run folder; its metrics.jsonl gives the curves (`loss`, `val_loss`,
            `tokens_per_s`, `mfu` by `step`).
        values: report.json, in this order. `val_loss` beside `val_bits_per_byte` puts
            the loss curve in bits per byte; `gzip_bits_per_byte` and
            `xz_bits_per_byte` are then drawn as its baselines. `goodput_s` is drawn as
            a bar.
        rows: every figure with how it was obtained; the first six stand on top.
        samples: (prompt, continuation).
        confusion: of a classifier: a picture and a table of its classes; the loss is
            then in nats per text.

    Raises:
        LlmosError: the folder cannot be written.
    """
    unit = "nats per token" if confusion is None else "nats per text"
    plots = _plots(read_metrics(folder / "metrics.jsonl"), values, plan, unit)
    if confusion is not None:
        plots["confusion"] = confusion_figure(confusion.labels, confusion.counts)
    page = _page(
        title=plan.params.name,
        subtitle=_subtitle(plan),
        headlines=rows[:_HEADLINES],
        rows=rows,
        figures={name: plot.svg for name, plot in plots.items()},
        wall_time=_wall_time(values.get("goodput_s") or {}),
        plan=plan,
        plan_text=plan.explain(),
        config_toml=config_toml,
        environment=environment,
        samples=samples,
        classes=_classes(confusion),
    )
    finite = {key: _finite(value) for key, value in values.items()}
    try:
        (folder / "plots").mkdir(parents=True, exist_ok=True)
        for name, plot in plots.items():
            (folder / "plots" / f"{name}.png").write_bytes(plot.png)
        _replace(folder / "report.json", json.dumps(finite, indent=2) + "\n")
        _replace(folder / "report.html", page)
    except OSError as problem:
        raise LlmosError(
            f"cannot write the report into {folder}: {problem.strerror}."
        ) from problem


def _plots(
    metrics: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    plan: Plan,
    unit: str,
) -> dict[str, Plot]:
    evaluations = [
        (row["step"], row["val_loss"])
        for row in metrics
        if isinstance(row.get("val_loss"), int | float) and "step" in row
    ]
    baselines = {
        label: values[key] for key, label in _BASELINES.items() if values.get(key)
    }
    return {
        "loss": loss_figure(
            metrics,
            evaluations,
            baselines,
            bytes_per_token=_bytes_per_token(values),
            unit=unit,
        ),
        "throughput": throughput_figure(metrics),
        "memory": memory_figure(
            plan.predicted.memory, plan.topology.hbm_bytes_per_device
        ),
    }


def _wall_time(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """Parts of a bar, left to right: the useful one first, then as they cost most."""
    meanings: dict[str, str] = {str(name): what for name, what in PHASES.items()}
    total = sum(seconds.values())
    shown = [(name, s) for name, s in seconds.items() if s > 0 and total]
    shown.sort(key=lambda part: (part[0] != "stepping", -part[1]))
    parts, left = [], 0.0
    for name, s in shown:
        share = 100 * s / total
        parts.append(
            {
                "name": name.replace("_", " "),
                "style": name,
                "what": meanings.get(name, ""),
                "left": f"{left:.3f}",
                "width": f"{share:.3f}",
                "share": f"{share:.1f}%",
                "time": format_seconds(s),
            }
        )
        left += share
    return parts


def _classes(confusion: Confusion | None) -> list[dict[str, Any]]:
    """Rows of the table of classes, as text; of a language model, none."""
    if confusion is None:
        return []
    rows = []
    for row in class_rows(confusion.labels, confusion.counts):
        shares = {name: f"{row[name]:.1%}" for name in ("precision", "recall", "f1")}
        found = row["taken_for"]
        taken_for = "" if found is None else f"{found[0]} ({found[1]:,})"
        texts = f"{row['texts']:,}"
        rows.append(row | shares | {"texts": texts, "taken_for": taken_for})
    return rows


def _bytes_per_token(values: Mapping[str, Any]) -> float | None:
    """What turned the validation loss (nats per token) into bits per byte."""
    loss, bits = values.get("val_loss"), values.get("val_bits_per_byte")
    if not loss or not bits:
        return None
    return float(loss / (math.log(2) * bits))


def _subtitle(plan: Plan) -> str:
    devices = plan.topology.num_devices
    return (
        f"{format_si(plan.params.num_params).replace(' ', '')} parameters on "
        f"{plan.topology.name} ({devices} device{'s' * (devices > 1)}), "
        f"{plan.workload.global_batch} x {plan.workload.seq_len} tokens a step"
    )


def _page(**fields: Any) -> str:
    import jinja2

    source = resources.files(__package__).joinpath("report.html.j2").read_text("utf-8")
    template = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    ).from_string(source)
    return template.render(**fields)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # JSON has no NaN
    return value


def _replace(path: Path, text: str) -> None:
    fresh = path.with_name(path.name + ".tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
