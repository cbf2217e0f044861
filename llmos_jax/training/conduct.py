"""Conduct a run from wherever it stands to its end: restore, loop, save, score."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

from llmos_jax import __version__
from llmos_jax.checkpoint import Manifest, require_space
from llmos_jax.config.schema import RunConfig
from llmos_jax.data import PreparedText, Tokenizer, TrainBatches
from llmos_jax.lowering import measure_matmul_flops_per_s
from llmos_jax.planner import model_flops, sizes_of
from llmos_jax.telemetry import Ledger, MetricsWriter, TrainProgress
from llmos_jax.training.answers import Source
from llmos_jax.training.folder import RunFolder, ranked_by, retention_of
from llmos_jax.training.local import local_replicas
from llmos_jax.training.loop import Hooks, Outcome, Pace, run
from llmos_jax.training.patience import Patience
from llmos_jax.training.saving import Saver, check_best, missing_best
from llmos_jax.training.session import Origin, Session, bits_per_byte
from llmos_jax.training.step import TrainState
from llmos_jax.units import format_seconds

Figures = Callable[[TrainState, Callable[[int, int], None]], dict[str, float]]
"""(state, what is told of every batch) -> figures of the validation data."""


def conduct(
    session: Session,
    source: Source,
    folder: RunFolder,
    *,
    tokenizer: Tokenizer,
    figures: Figures,
    origin: Origin | None = None,
    say: Callable[[str], None],
    is_first: bool,
    ledger: Ledger | None = None,
) -> Outcome:
    """Train to `train.steps` (or the clock, or a signal), saving as configured.

    Args:
        session: what to train.
        source: batches to train on; the rows that this process reads.
        folder: where; a checkpoint in it is gone on from.
        tokenizer: saved beside the weights.
        figures: scores the validation data, on the way.
        origin: whose weights a new run begins with; None draws them.
        say: writes a line.
        is_first: whether this process speaks and writes for all.
        ledger: where the time goes.

    Raises:
        CheckpointError: the folder's checkpoint is of another model, or damaged; there
            is no space for checkpoints.
        TrainingError: the loss stopped making sense.
    """
    config, start = session.config, folder.resume_step
    ledger = ledger or Ledger()
    check_best(config.checkpoint.best, config.train.eval_every, config.train.patience)
    require_space(
        folder.store.folder,
        session.state_shape,
        retention_of(config),
        steps=config.train.steps,
        every=config.checkpoint.every,
    )
    ledger.enter("restoring")
    ledger.resumed(start)
    if start:
        say(f"resuming from step {start} in {folder.path}")
        state = session.restore(folder.store, start)
        source.set_state(folder.store.manifest(start).data)
    elif origin is not None:
        say(f"beginning with the weights of {session.config.model}")
        state = session.begin_with(origin)
    else:
        state = session.fresh()
    ledger.enter("compiling")
    say(f"compiled the training step in {format_seconds(session.program.compile())}")
    pace = _pace(session)
    saver = Saver(folder.store, say, config.checkpoint.grace_s, folder.mirror)
    hooks = _hooks(session, source, folder, tokenizer, figures, saver, ledger)
    writer: Any = _Quiet()
    if is_first:
        writer = MetricsWriter(folder.path, resume_step=start)
    limit = config.train.max_minutes
    progress = TrainProgress(
        config.train.steps,
        start_step=start,
        max_seconds=None if limit is None else 60 * limit,
        enabled=is_first,
    )
    ledger.enter("stepping")
    with writer, progress, folder.stop.while_training(saver.lost):
        outcome = run(
            session.step,
            state,
            session.batches(source),
            config=config,
            start_step=start,
            pace=pace,
            writer=writer,
            progress=progress,
            hooks=hooks,
            stop=folder.stop,
            ledger=ledger,
        )
        with ledger.during("saving"):
            saver.finish()
    if config.train.patience is None or outcome.reason == "signal":
        return outcome
    return _with_best(session, folder, outcome, say)


def _with_best(
    session: Session, folder: RunFolder, outcome: Outcome, say: Callable[[str], None]
) -> Outcome:
    """What a run ended with that waited for the best: that checkpoint."""
    name = ranked_by(session.config)
    folder.store.wait()
    best = folder.store.best(name, folder.store.steps())
    if best is None or best == outcome.step:
        return outcome
    say(f"step {best} had the lowest {name}: this is the model")
    state = session.restore(folder.store, best)
    return replace(outcome, state=state, model_step=best)


def text_batches(session: Session, text: PreparedText, start_step: int) -> TrainBatches:
    """The batches of a text, from a step on, for this process."""
    config = session.config
    return TrainBatches(
        text.train,
        seq_len=config.batch.seq_len,
        global_batch=session.plan.workload.global_batch,
        seed=config.run.seed,
        rows=session.rows,
        start_step=start_step,
        document_mask=config.data.document_mask,
        weights=text.weights,
        packing=config.data.packing,
    )


def text_figures(
    session: Session,
    text: PreparedText,
    state: TrainState,
    beat: Callable[[int, int], None],
) -> dict[str, float]:
    """What held-out text says of a state."""
    score = session.score(
        state.params, text.validation, session.config.train.eval_batches, beat
    )
    return {
        "val_loss": score.loss,
        "val_bits_per_byte": bits_per_byte(score, text.validation),
    }


def _pace(session: Session) -> Pace:
    """Rates of this run: model FLOPs of a step, and the peak they are held against."""
    plan, workload = session.plan, session.workload
    if plan.topology.chip.vendor == "cpu":
        peak = measure_matmul_flops_per_s() * jax.process_count()
    else:
        dtype = session.config.train.compute_dtype
        peak = plan.topology.peak_flops_per_s(dtype) * plan.topology.num_devices
    flops = model_flops(sizes_of(plan.params), workload)
    return Pace(workload.tokens, flops, peak)


def _hooks(
    session: Session,
    source: Source,
    folder: RunFolder,
    tokenizer: Tokenizer,
    figures: Figures,
    saver: Saver,
    ledger: Ledger,
) -> Hooks:
    config, plan = session.config, session.plan
    tokenizer_json = tokenizer.to_json()
    told: set[str] = set()

    def beat(done: int, total: int) -> None:
        ledger.beat()
        if folder.stop.is_urgent:
            raise _Urgent

    def evaluate(state: TrainState, step: int) -> dict[str, float]:
        try:
            return figures(state, beat)
        except _Urgent:
            return {}

    def save(state: TrainState, known: dict[str, float]) -> None:
        step = int(state.step.addressable_data(0))
        manifest = Manifest(
            step=step,
            model=session.skeleton.spec,
            plan_fingerprint=plan.fingerprint,
            mesh=plan.mesh.sizes,
            data={**source.get_state(), "step": step},
            metrics=known,
            local_replicas=local_replicas(plan),
            made_by={"llmos_jax": __version__, "jax": jax.__version__},
        )
        warning = missing_best(config.checkpoint.best, known)
        if warning and not told:
            told.add(warning)
            folder.say(warning)
        saver.save(
            step,
            lambda: folder.store.save(
                manifest, state.params, state.optimizer, tokenizer_json
            ),
        )

    hooks = Hooks(
        evaluate=evaluate if config.train.eval_every else None,
        save=save,
        look=saver.look,
        last_saved=folder.last_saved,
        conclude=session.concluded,
        enough=_patience(folder, config),
        least_loss=session.least_loss,
    )
    if jax.process_count() == 1:
        return hooks
    return replace(hooks, agreed_to_stop=folder.store.reached_preemption)


def _patience(folder: RunFolder, config: RunConfig) -> Callable[..., bool] | None:
    if config.train.patience is None:
        return None
    name = ranked_by(config) or ""
    return Patience(name, config.train.patience, folder.path, folder.resume_step).told


class _Urgent(Exception):
    """There is no time for an evaluation."""


class _Quiet:
    """A MetricsWriter that writes nothing, for all processes but the first."""

    def write(self, row: dict[str, Any]) -> None:
        """Drop a row."""

    def __enter__(self) -> _Quiet:
        return self

    def __exit__(self, *exception: object) -> None:
        return None
