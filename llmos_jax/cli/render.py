"""Turn a verb's figures into the lines a person reads."""

from __future__ import annotations

from typing import Any

from llmos_jax.units import format_bytes, format_seconds


def table(figures: dict[str, Any]) -> str:
    """Aligned `name  value` lines."""
    width = max(len(name) for name in figures)
    return "\n".join(
        f"{name.replace('_', ' '):<{width}}  {_number(value)}"
        for name, value in figures.items()
    )


def train_summary(report: dict[str, Any]) -> str:
    """What a finished (or stopped) run came to, and what to do next."""
    if not report:
        return ""
    lines = [_stopped(report), ""]
    if "val_bits_per_byte" in report:
        lines += [
            "held-out text        bits per byte",
            f"  this model         {report['val_bits_per_byte']:.3f}",
            f"  gzip -9            {report['gzip_bits_per_byte']:.3f}",
            f"  xz -9              {report['xz_bits_per_byte']:.3f}",
            "",
        ]
    run = report["run_dir"]
    lines += _classes(report)
    if "goodput_s" in report:
        lines += [_goodput(report["goodput"], report["goodput_s"]), ""]
    lines += [
        f"report       {report['report']}",
        f"checkpoint   {report['checkpoint']}",
        f"plots        {run}/plots/",
        f"metrics      {run}/metrics.jsonl, {run}/tensorboard/",
        "",
        "next",
        *_next(run, is_classifier="labels" in report),
    ]
    return "\n".join(lines)


def _classes(report: dict[str, Any]) -> list[str]:
    """How a classifier did on what it had not seen."""
    lines = [
        f"{name} texts   accuracy {report[f'{side}_accuracy']:.1%}, "
        f"macro F1 {report[f'{side}_macro_f1']:.3f}"
        for side, name in (("test", "test"), ("val", "held-out"))
        if "labels" in report and f"{side}_accuracy" in report
    ]
    return [*lines, ""] if lines else []


def _next(run: str, *, is_classifier: bool) -> list[str]:
    if is_classifier:
        return [
            f"  python -m llmos_jax.evaluate {run} --predict predictions.jsonl "
            "--set data.test=FILE",
            f"  python -m llmos_jax.serve {run}",
        ]
    return [
        f'  python -m llmos_jax.generate {run} --prompt "def main():"',
        f"  python -m llmos_jax.evaluate {run}",
        f"  python -m llmos_jax.train --set run.dir={run}-2 --set data.train=FOLDER",
    ]


def doctor(report: dict[str, Any]) -> str:
    """One line per check; the remedy under what is not in order."""
    lines = []
    for check in report["checks"]:
        lines.append(f"{check['status']:<5} {check['name']:<18} {check['detail']}")
        if check["remedy"]:
            lines.append(f"{'':<25}{check['remedy']}")
    if "checkpoint" in report:
        lines += ["", *_checkpoint(report["checkpoint"])]
    return "\n".join(lines)


def damage(report: dict[str, Any]) -> str:
    """Which steps of a checkpoint are damaged, in one line; empty: none."""
    found = report.get("checkpoint", {})
    if not found.get("damaged"):
        return ""
    files = sum(len(one["faults"]) for one in found["steps"])
    steps = ", ".join(map(str, found["damaged"]))
    whole = [n for n in found["steps_kept"] if n not in found["damaged"]]
    remedy = "nothing else is kept"
    if whole:
        remedy = f"go on from step {whole[-1]} with checkpoint.on_damage=previous"
    return f"step {steps} is damaged ({files} fault{'s' * (files > 1)}); {remedy}."


def _checkpoint(figures: dict[str, Any]) -> list[str]:
    """What a checkpoint holds; then a line for each of its steps."""
    longer = {
        "steps",
        "arrays",
        "metrics",
        "data",
        "damaged",
        "set_aside",
        "provenance",
    }
    plain = {name: x for name, x in figures.items() if name not in longer}
    lines = [table({**plain, **figures.get("metrics", {})})]
    for one in figures.get("steps", ()):
        how = "verified against its checksums" if one["sealed"] else "not sealed, read"
        size = format_bytes(one["bytes"])
        if not one["faults"]:
            lines.append(f"ok    step {one['step']:<13} {size}, {how}")
        lines += [f"fail  step {one['step']:<13} {fault}" for fault in one["faults"]]
    return lines


def _stopped(report: dict[str, Any]) -> str:
    loss, rate = report.get("final_loss"), report.get("tokens_per_s")
    figures = f"step {report['steps']}"
    figures += "" if loss is None else f", loss {loss:.3f}"
    figures += "" if rate is None else f", {rate:,.0f} tokens/s"
    took = format_seconds(report["train_s"])
    why = {
        "finished": f"finished in {took}",
        "time": f"stopped by train.max_minutes after {took}",
    }.get(
        report["stopped_by"], f"stopped by {report['stopped_by']} after {took}, saved"
    )
    return f"{why}: {figures}"


def _goodput(share: float, seconds: dict[str, float]) -> str:
    """`goodput  81.0% of 2m05s; then: compiling 9.1%, starting 6.0%, down 3.9%`."""
    wall_s = sum(seconds.values()) or 1.0
    rest = sorted(
        ((s / wall_s, name) for name, s in seconds.items() if name != "stepping"),
        reverse=True,
    )
    told = [f"{name.replace('_', ' ')} {part:.1%}" for part, name in rest[:3] if part]
    return f"goodput      {share:.1%} of {format_seconds(wall_s)}" + (
        f"; then: {', '.join(told)}" if told else ""
    )


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def scores(report: dict[str, Any]) -> str:
    """What an evaluation found; of a classifier, a line for each class, too."""
    longer = {"labels", "classes", "confusion"}
    lines = [table({name: x for name, x in report.items() if name not in longer})]
    if "classes" not in report:
        return lines[0]
    width = max(len("class"), *(len(one["label"]) for one in report["classes"]))
    lines += ["", f"{'class':<{width}}  texts  right     f1"]
    for one in report["classes"]:
        f1 = "-" if one["f1"] is None else f"{one['f1']:.3f}"
        lines.append(
            f"{one['label']:<{width}}  {one['texts']:>5}  {one['right']:>5}  {f1:>5}"
        )
    return "\n".join(lines)
