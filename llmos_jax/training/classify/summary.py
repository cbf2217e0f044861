"""Sum up a classifier's run: report.json, report.html with its confusion matrix."""

from __future__ import annotations

from typing import Any

from llmos_jax.config import to_toml
from llmos_jax.data.labelled import LabelledData
from llmos_jax.ir import ReportRow
from llmos_jax.telemetry import Confusion, Goodput, environment, write_report
from llmos_jax.training.classify.score import ClassScore
from llmos_jax.training.folder import RunFolder
from llmos_jax.training.loop import Outcome
from llmos_jax.training.session import Session
from llmos_jax.training.summary import ending, goodput_row, speed_rows


def summarise_classes(
    session: Session,
    data: LabelledData,
    folder: RunFolder,
    outcome: Outcome,
    scores: dict[str, ClassScore],
    goodput: Goodput,
) -> dict[str, Any]:
    """Write report.json and report.html into the run folder; return report.json.

    Args:
        session: what was trained.
        data: on what.
        folder: where.
        outcome: how it ended.
        scores: of the sides `test` and `val`, where there was time to take them.
        goodput: where the time went until now.
    """
    rows = [*_score_rows(data, scores), *speed_rows(session, outcome)]
    rows.append(goodput_row(goodput))
    values: dict[str, Any] = {row.name: row.value for row in rows}
    values |= ending(session, folder, outcome, goodput)
    values |= {"labels": list(data.labels), "data": data.stats}
    values["classes"] = {
        side: classes_of(data.labels, score) for side, score in scores.items()
    }
    shown = scores.get("test") or scores.get("val")
    write_report(
        folder.path,
        values=values,
        rows=rows,
        plan=session.plan,
        config_toml=to_toml(session.config),
        environment=environment(),
        samples=(),
        confusion=None if shown is None else confusion_of(data.labels, shown),
    )
    return values


def confusion_of(labels: tuple[str, ...], score: ClassScore) -> Confusion:
    """The matrix of a score, for the page."""
    counts = tuple(tuple(int(x) for x in row) for row in score.counts)
    return Confusion(labels=labels, counts=counts)


def classes_of(labels: tuple[str, ...], score: ClassScore) -> list[dict[str, Any]]:
    """What became of each class: its texts, those taken for it, those right, F1."""
    return [
        {
            "label": label,
            "texts": int(score.counts[c].sum()),
            "taken_for_it": int(score.counts[:, c].sum()),
            "right": int(score.counts[c, c]),
            "f1": score.f1[c],
        }
        for c, label in enumerate(labels)
    ]


def _score_rows(data: LabelledData, scores: dict[str, ClassScore]) -> list[ReportRow]:
    rows = []
    for side in ("test", "val"):
        score = scores.get(side)
        if score is None:
            continue
        held_out = "" if side == "test" else f" ({data.held_out_by})"
        texts = f"{score.texts:,} {side} texts{held_out}"
        for name, value, unit, how in (
            ("accuracy", score.accuracy, "share", f"{texts} taken for what they are"),
            ("macro_f1", score.macro_f1, "", f"mean F1 of the classes of {texts}"),
            ("loss", score.loss, "nats/text", f"-log p(right class) of {texts}"),
        ):
            rows.append(
                ReportRow(name=f"{side}_{name}", value=value, unit=unit, how=how)
            )
    return rows
