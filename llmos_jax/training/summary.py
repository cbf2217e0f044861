"""Sum a finished run up: report.json, report.html, and the few lines a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmos_jax.config import to_toml
from llmos_jax.data import PreparedText, compare
from llmos_jax.ir import ReportRow
from llmos_jax.telemetry import Goodput, environment, write_report
from llmos_jax.training.evaluate import Score
from llmos_jax.training.folder import RunFolder
from llmos_jax.training.local import replica_bytes_per_step
from llmos_jax.training.loop import Outcome
from llmos_jax.training.session import Session
from llmos_jax.units import format_seconds

Samples = Sequence[tuple[str, str]]


def summarise(
    session: Session,
    text: PreparedText,
    folder: RunFolder,
    outcome: Outcome,
    score: Score | None,
    samples: Samples,
    goodput: Goodput,
) -> dict[str, Any]:
    """Write report.json and report.html into the run folder; return report.json.

    `score` is None when a signal ended the run and there was no time to take one.
    `goodput` is where the time went until now.
    """
    rows = [*_rows(session, text, outcome, score), goodput_row(goodput)]
    values: dict[str, Any] = {row.name: row.value for row in rows}
    values |= ending(session, folder, outcome, goodput)
    values |= {"sync": _sync(session), "data": _data(text, values["tokens_seen"])}
    write_report(
        folder.path,
        values=values,
        rows=rows,
        plan=session.plan,
        config_toml=to_toml(session.config),
        environment=environment(),
        samples=samples,
    )
    return values


def ending(
    session: Session, folder: RunFolder, outcome: Outcome, goodput: Goodput
) -> dict[str, Any]:
    """How a run ended, where its things lie, and where its time went."""
    model_step = outcome.model_step or outcome.step
    return {
        "stopped_by": outcome.signal or outcome.reason,
        "resumed_from": folder.resume_step,
        "run_dir": str(folder.path),
        "checkpoint": str(folder.path / "checkpoints" / str(model_step)),
        "report": str(folder.path / "report.html"),
        "goodput_s": {name: round(s, 3) for name, s in goodput.seconds.items()},
        "plan_fingerprint": session.plan.fingerprint,
    }


def _rows(
    session: Session,
    text: PreparedText,
    outcome: Outcome,
    score: Score | None,
) -> list[ReportRow]:
    held_out = text.validation
    rows = []

    def row(name: str, value: Any, unit: str, how: str) -> None:
        rows.append(ReportRow(name=name, value=value, unit=unit, how=how))

    if score is not None:
        per_byte = "on the same bytes of held-out text"
        row(
            "val_bits_per_byte",
            score.bits_per_byte(held_out.num_bytes),
            "bits/byte",
            f"all {held_out.num_bytes:,} bytes of held-out text ({text.held_out_by}), "
            "end marks paid for",
        )
        compressors = compare(held_out.raw_bytes())
        row("gzip_bits_per_byte", compressors["gzip_bits_per_byte"], "bits/byte",
            f"gzip -9 {per_byte}")  # fmt: skip
        row("xz_bits_per_byte", compressors["xz_bits_per_byte"], "bits/byte",
            f"xz -9 {per_byte}")  # fmt: skip
        row("val_loss", score.loss, "nats/token", "mean over held-out tokens")
        row("val_perplexity", score.perplexity, "", "exp(val_loss)")
        row("val_accuracy", score.accuracy, "share", "next token guessed right")
    return [*rows, *speed_rows(session, outcome), _replica_row(session)]


def speed_rows(session: Session, outcome: Outcome) -> list[ReportRow]:
    """How fast a run was, and how far it came."""
    pace, step_s = outcome.pace, outcome.median_step_s
    is_text = session.skeleton.spec.classes is None
    rows = []

    def row(name: str, value: Any, unit: str, how: str) -> None:
        rows.append(ReportRow(name=name, value=value, unit=unit, how=how))

    unit = "nats/token" if is_text else "nats/text"
    row("final_loss", outcome.final_loss, unit, "training loss, last step")
    rate = None if step_s is None else pace.tokens_per_step / step_s
    row("tokens_per_s", rate, "tokens/s", "tokens of a step / median step time")
    row("step_s", step_s, "s", "median, the first step left out")
    mfu = step_s and pace.flops_per_step / step_s / pace.peak_flops_per_s
    peak = (
        "a float32 matmul measured on this CPU"
        if session.plan.topology.chip.vendor == "cpu"
        else "the data sheet's peak"
    )
    row("mfu", mfu, "share", f"model FLOPs (6N + causal attention) against {peak}")
    row("steps", outcome.step, "", "training steps done, all sittings together")
    tokens = outcome.step * pace.tokens_per_step
    row("tokens_seen", tokens, "tokens", "steps * batch.global * tokens of a row")
    row("train_s", outcome.train_s, "s", "this sitting, evaluations included")
    row("params", session.skeleton.table.num_params, "", "all parameters")
    return rows


def goodput_row(goodput: Goodput) -> ReportRow:
    """The share of its time that a run spent on steps that it kept."""
    return ReportRow(
        name="goodput",
        value=goodput.share,
        unit="share",
        how="time of steps that the run kept, of the "
        f"{format_seconds(goodput.wall_s)} since it was first started",
    )


def _data(text: PreparedText, tokens_seen: int) -> dict[str, Any]:
    """What the text was, and how many tokens (and epochs) came of each source."""
    stats = text.stats
    for source in [stats["train"], *stats.get("sources", [])]:
        source["tokens_seen"] = round(tokens_seen * source.get("share", 1.0))
        source["epochs"] = source["tokens_seen"] / source["tokens"]
    return stats


def _sync(session: Session) -> dict[str, Any]:
    """How replicas agree: `steps` lie between two agreements."""
    workload = session.plan.workload
    return {
        "strategy": "local" if workload.local_steps else "every_step",
        "steps": workload.local_steps or 1,
        "replicas": session.plan.mesh.data,
    }


def _replica_row(session: Session) -> ReportRow:
    plan = session.plan
    slices = plan.topology.slices
    where = f"over DCN, between {slices} slices" if slices > 1 else "within one slice"
    every = plan.workload.local_steps or 1
    return ReportRow(
        name="replica_bytes_per_step",
        value=replica_bytes_per_step(plan),
        unit="bytes",
        how=f"from a device to other replicas ({where}): 2 (R - 1) / R of its float32 "
        f"gradients, R = {plan.mesh.data}, every {every} steps",
    )
