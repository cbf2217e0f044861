"""A classifier's way through the house: labelled texts instead of a stream of tokens.

Planning, the loop, checkpoints and reports are those of language models.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmos_jax import resolve
from llmos_jax.config import RunConfig
from llmos_jax.errors import ConfigError
from llmos_jax.ir import Plan
from llmos_jax.places import cache_folder
from llmos_jax.scoring import tell as tell_progress

if TYPE_CHECKING:
    from llmos_jax.data.labelled import LabelledSide
    from llmos_jax.interchange import OpenedModel
    from llmos_jax.models import Skeleton
    from llmos_jax.telemetry import Ledger
    from llmos_jax.training import RunFolder
    from llmos_jax.training.classify import Judged


def train(
    config: RunConfig,
    skeleton: Skeleton,
    chosen: Plan,
    folder: RunFolder,
    origin: OpenedModel | None,
    ledger: Ledger,
    *,
    say: Callable[[str], None],
    tell: Callable[[str], None],
    is_first: bool,
) -> dict[str, Any]:
    """Train the classifier of a config in its run folder; return report.json.

    Args:
        config: the run.
        skeleton: its model.
        chosen: its plan.
        folder: held open.
        origin: whose weights it begins with; None draws them.
        ledger: where the time goes.
        say: writes a line.
        tell: the same, and says that the process is alive.
        is_first: whether this process writes for all.

    Raises:
        DataError: labelled texts that cannot be read or learned from.
    """
    from llmos_jax import training
    from llmos_jax.data.labelled import padding_share, prepare_labelled
    from llmos_jax.training import classify

    spec = skeleton.spec
    assert spec.classes is not None
    data = prepare_labelled(
        config.data,
        labels=spec.classes.labels,
        own=None if origin is None else origin.tokenizer,
        vocab_size=spec.vocab_size,
        model_name=spec.name,
        seq_len=config.batch.seq_len,
        cache=cache_folder(),
        on_progress=tell,
    )
    padding = padding_share(
        data.train,
        seq_len=config.batch.seq_len,
        batch=chosen.workload.global_batch,
    )
    say(f"{len(data.train):,} texts to learn from, {padding:.0%} padding")
    session = classify.open_class_session(skeleton, chosen, config, data)
    outcome = training.conduct(
        session,
        classify.class_batches(session, data, folder.resume_step),
        folder,
        tokenizer=data.tokenizer,
        figures=partial(classify.class_figures, session, data),
        origin=origin,
        say=say,
        is_first=is_first,
        ledger=ledger,
    )
    scores = {}
    if outcome.reason != "signal":
        with ledger.during("evaluating"):
            params = outcome.state.params
            sides = {"test": data.test, "val": data.validation}
            scores = {
                name: classify.class_score(session, params, side, None, ledger.beat)
                for name, side in sides.items()
                if side is not None
            }
        ledger.enter("stopping")
    report = {}
    if is_first:
        report = classify.summarise_classes(
            session, data, folder, outcome, scores, ledger.goodput()
        )
    ledger.close(outcome.reason)
    return report


def evaluate(
    opened: OpenedModel,
    config: RunConfig,
    plan: Callable[[RunConfig], Plan],
    predict: str | None,
) -> dict[str, Any]:
    """Score a classifier on labelled texts, and write what it says of each.

    Args:
        opened: the model.
        config: `[data]` says which texts: test, else validation, else what the
            training data hold out.
        plan: how it is split over the devices here.
        predict: a file to be written; labels may then be missing.

    Raises:
        DataError: texts that cannot be read, or no label to compare with.
        ConfigError: the file cannot be written.
    """
    from llmos_jax import lowering
    from llmos_jax.data.labelled import read_to_predict
    from llmos_jax.telemetry import log
    from llmos_jax.training import classify

    spec = opened.skeleton.spec
    assert spec.classes is not None
    labels = spec.classes.labels
    side, notes = read_to_predict(
        config.data,
        opened.tokenizer,
        seq_len=config.batch.seq_len,
        labels=labels,
        needs_labels=predict is None,
    )
    for note in notes:
        log(note)
    chosen = plan(resolve.to_score(config))
    dtype = config.train.compute_dtype
    scorer = classify.open_class_scorer(opened.skeleton, chosen, dtype)
    shardings = lowering.param_shardings(chosen, scorer.places.mesh)
    params = resolve.read_to_compute(opened, dtype, shardings)
    judged = list(scorer.judged(params, side, tell_progress("classifying", "texts")))
    report: dict[str, Any] = {
        "model": spec.name,
        "step": opened.step,
        "texts": len(side),
    }
    if predict is not None:
        if lowering.is_first_process():
            write_predictions(predict, side, labels, judged)
        report["predictions"] = predict
    known = sum(int((part.labels >= 0).sum()) for part in judged)
    if known:
        score = classify.total_class_score(iter(judged))
        report |= {
            "labelled_texts": known,
            "accuracy": score.accuracy,
            "macro_f1": score.macro_f1,
            "loss": score.loss,
            "labels": list(labels),
            "classes": classify.classes_of(labels, score),
            "confusion": score.counts.tolist(),
        }
    return report


def write_predictions(
    file: str, side: LabelledSide, labels: tuple[str, ...], judged: list[Judged]
) -> None:
    """Write a JSON line for every text, in their order: where it stands, what it is
    taken for, with what probability, and its label where one is known."""
    by_text: list[dict[str, Any]] = [{} for _ in range(len(side))]
    for part in judged:
        for index, log_probs, label in zip(part.index, part.log_probs, part.labels):
            best = int(np.argmax(log_probs))
            probs = np.exp(log_probs.astype(np.float64))
            by_text[int(index)] = {
                "place": side.place(int(index)),
                "predicted": labels[best],
                "probability": float(probs[best]),
                **({"label": labels[label]} if label >= 0 else {}),
                "probabilities": {
                    name: round(float(p), 6) for name, p in zip(labels, probs)
                },
                "text": side.text(int(index)),
            }
    path = Path(file).expanduser()
    try:
        with path.open("w", encoding="utf-8") as out:
            for said in by_text:
                out.write(json.dumps(said, ensure_ascii=False) + "\n")
    except OSError as problem:
        raise ConfigError(
            f"--predict {file} cannot be written: {problem.strerror or problem}. Name "
            "another file."
        ) from None
