"""A run that stops making sense stops, says so, and keeps what was good."""

from __future__ import annotations

import math

import numpy as np
import pytest
import small

from llmos_jax import train as train_page
from llmos_jax.checkpoint import find_checkpoint
from llmos_jax.errors import TrainingError
from llmos_jax.training.watch import DivergenceWatch, StopSignal


def said():
    return "The last good checkpoint is 7."


def test_a_loss_that_is_not_finite_stops_the_run_with_one_line(
    tmp_path, small_model, text_file, capsys
):
    folder = tmp_path / "run"
    texts = small.overrides(
        folder, small_model, text_file, train__learning_rate=1e30, checkpoint__every=1
    )
    assert train_page.main(small.flags(texts)) == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "became nan" in errors[0]
    assert "train.learning_rate" in errors[0] and "Traceback" not in printed.err
    latest = find_checkpoint(str(folder)).step
    assert f"checkpoints/{latest}" in errors[0], "names the last good checkpoint"
    kept = small.arrays(folder, latest)
    assert all(np.isfinite(value).all() for value in kept.values())
    assert printed.out == ""


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_the_watch_stops_at_once_on_a_loss_that_is_not_finite(loss):
    with pytest.raises(TrainingError, match=r"step 3 the loss became (nan|inf).*is 7"):
        DivergenceWatch(3.0).check(3, loss, 1.0, said)


def test_the_watch_stops_on_a_gradient_that_is_not_finite():
    with pytest.raises(TrainingError, match="the gradient norm became inf"):
        DivergenceWatch(3.0).check(1, 2.0, math.inf, said)


def watch_after(steps):
    watch = DivergenceWatch(3.0)
    for step in range(steps):
        watch.check(step, 2.0, 1.0, said)
    return watch


def test_the_watch_stops_a_loss_above_three_times_its_median():
    watch = watch_after(20)
    watch.check(20, 6.0, 1.0, said)
    with pytest.raises(TrainingError, match="jumped to 6.01, more than train.explode"):
        watch.check(21, 6.01, 1.0, said)


def test_the_watch_lets_a_fresh_model_jump():
    watch_after(19).check(19, 100.0, 1.0, said)


def test_the_watch_asks_for_the_last_checkpoint_only_when_it_stops():
    def never():
        raise AssertionError("asked in vain")

    DivergenceWatch(3.0).check(1, 2.0, 1.0, never)


def test_a_second_interrupt_does_not_wait():
    import signal

    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        assert stop.received == "SIGINT"
        signal.raise_signal(signal.SIGINT)


def test_among_several_processes_no_signal_is_taken():
    import signal

    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(enabled=False):
        assert signal.getsignal(signal.SIGTERM) is before
