"""Run a training Program over batches: step, watch, record, evaluate, save.

The metrics of a step are read while the next one runs, so the host never stalls the
device; only an evaluation or a checkpoint waits. Nothing is saved before the loss and
gradient of every step up to it are known to be finite.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax

from llmos_jax.config.schema import RunConfig
from llmos_jax.lowering import fetch
from llmos_jax.lowering.peers import shared_fate
from llmos_jax.telemetry import Ledger, MetricsWriter, TrainProgress
from llmos_jax.training.optimizer import learning_rate
from llmos_jax.training.step import Batch, Metrics, TrainState
from llmos_jax.training.watch import Clock, DivergenceWatch, StopSignal

Reason = Literal["finished", "time", "settled", "signal"]
_AGREE_EVERY = 10
"""Steps between agreements of several processes on the clock (a small broadcast)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """What the loop calls out to, so that it needs no disk and no data of its own."""

    evaluate: Callable[[TrainState, int], dict[str, float]] | None
    """(state, step) -> figures of the validation text."""
    save: Callable[[TrainState, dict[str, float]], None]
    """(state, its figures): start a checkpoint of this state."""
    look: Callable[[int], None]
    """(step): a step was sent to the device; say what became of the last save."""
    last_saved: Callable[[], str]
    """A sentence that names the last good checkpoint."""
    conclude: Callable[[TrainState, int], TrainState]
    """(state, step) -> the state that a run ends with, by its steps or its clock. One
    that a signal stops goes on later as if nothing had been."""
    enough: Callable[[dict[str, float]], bool] | None = None
    """(figures of an evaluation): whether more steps would gain nothing."""
    least_loss: float = 0.0
    """What a loss is compared with at least, when it is judged to explode."""
    agreed_to_stop: Callable[[int], bool] | None = None
    """Several processes only: whether all have agreed to stop at this step."""


class Pace(NamedTuple):
    """What turns a step time into rates: constants of the run."""

    tokens_per_step: int
    flops_per_step: float
    peak_flops_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Where the loop ended and how fast it ran."""

    state: TrainState
    step: int
    reason: Reason
    final_loss: float | None
    train_s: float
    median_step_s: float | None
    pace: Pace
    signal: str | None = None
    model_step: int | None = None
    """The step that `state` is of, where it is not the last."""


def run(
    program: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    state: TrainState,
    batches: Iterator[Batch],
    *,
    config: RunConfig,
    start_step: int,
    pace: Pace,
    writer: MetricsWriter,
    progress: TrainProgress,
    hooks: Hooks,
    stop: StopSignal,
    ledger: Ledger | None = None,
) -> Outcome:
    """Train from `start_step` to `train.steps`, the clock or a signal.

    Raises:
        TrainingError: the loss or gradient stopped being finite, or exploded.
        LowerError: another process of the run is gone.
    """
    ledger = ledger or Ledger()
    recorder = _Recorder(config, pace, writer, progress, hooks, ledger)
    clock = Clock(config.train.max_minutes)
    step, reason = start_step, "finished"
    saved_at = start_step
    with shared_fate(lambda: _how_to_go_on(config, recorder.step)):
        while step < config.train.steps:
            batch = next(batches)
            ledger.got_batch(is_idle=recorder.is_idle)
            state, metrics = program(state, batch)
            step += 1
            recorder.submit(step, metrics)
            ledger.stepped(step)
            hooks.look(step)
            stopped = _stop_reason(step, stop, clock, hooks)
            if stopped == "time" or step == config.train.steps:
                state = hooks.conclude(state, step)
            every = config.train.eval_every
            if hooks.evaluate and every and step % every == 0:
                recorder.flush(partial(hooks.evaluate, state, step))
                stopped = stopped or ("signal" if stop.is_urgent else None)
                if hooks.enough is not None and hooks.enough(recorder.latest):
                    stopped = stopped or "settled"
            if step % config.checkpoint.every == 0:
                recorder.flush()
                with ledger.during("saving"):
                    hooks.save(state, recorder.latest)
                saved_at = step
            if stopped:
                reason = stopped
                break
        recorder.flush()
        if saved_at != step:
            with ledger.during("saving"):
                hooks.save(state, recorder.latest)
    return Outcome(
        state=state,
        step=step,
        reason=reason,  # type: ignore[arg-type]
        final_loss=recorder.latest.get("loss"),
        train_s=clock.elapsed_s,
        median_step_s=recorder.median_step_s,
        pace=pace,
        signal=(stop.received or "SIGTERM") if reason == "signal" else None,
    )


class _Recorder:
    """Turns device metrics into rows, one step behind the device."""

    def __init__(
        self,
        config: RunConfig,
        pace: Pace,
        writer: MetricsWriter,
        progress: TrainProgress,
        hooks: Hooks,
        ledger: Ledger,
    ):
        self.latest: dict[str, float] = {}
        self.step: int | None = None
        self._watch = DivergenceWatch(config.train.explode_ratio, hooks.least_loss)
        self._schedule = learning_rate(config.train)
        self._pace, self._writer, self._progress = pace, writer, progress
        self._hooks, self._ledger = hooks, ledger
        self._pending: tuple[int, Metrics] | None = None
        self._step_times: list[float] = []
        self._last_time: float | None = None

    def submit(self, step: int, metrics: Metrics) -> None:
        """Take this step's metrics; read the step before."""
        before, self._pending = self._pending, (step, metrics)
        if self._last_time is None:
            self._last_time = time.perf_counter()
            jax.block_until_ready(metrics)
            self._ledger.waited()
        if before is not None:
            self._record(*before)

    def flush(self, evaluate: Callable[[], dict[str, float]] | None = None) -> None:
        """Read what is pending; blocks until the device is done.

        `evaluate` runs then, its figures join the step's row, and the time it takes
        counts as no step's.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        jax.block_until_ready(metrics)
        self._ledger.waited()
        self._record(step, metrics, evaluate)

    @property
    def is_idle(self) -> bool:
        """Whether the device has nothing to do."""
        if self._pending is None:
            return True
        return all(x.is_ready() for x in jax.tree.leaves(self._pending[1]))

    @property
    def median_step_s(self) -> float | None:
        """Median seconds per step, the first (which compiles) left out."""
        times = self._step_times[1:] or self._step_times
        return statistics.median(times) if times else None

    def _record(
        self,
        step: int,
        metrics: Metrics,
        evaluate: Callable[[], dict[str, float]] | None = None,
    ) -> None:
        loss = float(fetch(metrics["loss"]))
        self.step = step
        grad_norm = float(fetch(metrics["grad_norm"]))
        now = time.perf_counter()
        assert self._last_time is not None
        step_s, self._last_time = max(now - self._last_time, 1e-9), now
        self._step_times.append(step_s)
        tokens_per_s = self._pace.tokens_per_step / step_s
        mfu = self._pace.flops_per_step / step_s / self._pace.peak_flops_per_s
        row = {
            "step": step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": float(self._schedule(step - 1)),
            "tokens_per_s": tokens_per_s,
            "step_s": step_s,
            "mfu": mfu,
        }
        others = {name: float(fetch(x)) for name, x in metrics.items()}
        row = {**others, **row}
        self._watch.check(step, loss, grad_norm, self._hooks.last_saved)
        figures = {}
        if evaluate:
            with self._ledger.during("evaluating"):
                figures = evaluate()
        if figures:
            self._last_time = time.perf_counter()
        self._writer.write({**row, **figures})
        self._progress.update(step, loss, tokens_per_s, mfu)
        self.latest = {**others, "lr": row["lr"], **figures}


def _how_to_go_on(config: RunConfig, last_step: int | None) -> str:
    """What to do when another process is gone.

    NOTE: reads the disk alone. Asking the checkpoint store would wait for the dead.
    """
    folder = Path(config.run.dir).expanduser()
    names = (path.name for path in folder.glob("checkpoints/*"))
    saved = max((int(name) for name in names if name.isdigit()), default=None)
    way = "starts anew" if saved is None else f"goes on from step {saved}"
    done = "" if last_step is None else f"The last step here was {last_step}. "
    return f"{done}Start all processes again: the run {way} in {folder}."


def _stop_reason(
    step: int, stop: StopSignal, clock: Clock, hooks: Hooks
) -> Reason | None:
    if hooks.agreed_to_stop is None:
        if stop.received:
            return "signal"
        return "time" if clock.is_over else None
    if hooks.agreed_to_stop(step):
        stop.begin_countdown()
        return "signal"
    if step % _AGREE_EVERY == 0 and _first_process_says(clock.is_over):
        return "time"
    return None


def _first_process_says(value: bool) -> bool:
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(value))
