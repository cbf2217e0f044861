"""However a run is stopped, its two halves equal the run that was not, bit for bit."""

from __future__ import annotations

import importlib
import json
import os
import signal
import textwrap

import pytest
import small

from llmos_jax import train as train_page
from llmos_jax.checkpoint import find_checkpoint

# The package's own `conduct` is the function of the same name.
conduct_module = importlib.import_module("llmos_jax.training.conduct")
PATIENCE_S = 120

KILLED_AT = textwrap.dedent(
    """
    import importlib, os, signal, sys, time
    from pathlib import Path
    from llmos_jax import train
    conduct = importlib.import_module("llmos_jax.training.conduct")

    class Progress(conduct.TrainProgress):
        def update(self, step, *figures):
            super().update(step, *figures)
            if step == {step}:
                while not Path({saved!r}).exists():
                    time.sleep(0.02)
                os.kill(os.getpid(), signal.SIGKILL)

    conduct.TrainProgress = Progress
    sys.exit(train.main({arguments!r}))
    """
)


@pytest.fixture
def texts(tmp_path, small_model, text_file):
    """A 20-step run with checkpoints at 10 and 20, in a folder of this test."""
    return small.overrides(tmp_path / "run", small_model, text_file)


def check_equal(folder, straight):
    assert small.losses(folder) == small.losses(straight)
    assert small.differing(small.arrays(folder), small.arrays(straight)) == []
    data = [
        store.manifest(step).data
        for store, step in (find_checkpoint(str(f)) for f in (folder, straight))
    ]
    assert data[0] == data[1], "the place in the data"


def kill_at(step, saved, texts):
    code = KILLED_AT.format(step=step, saved=str(saved), arguments=small.flags(texts))
    process = small.start(code)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -signal.SIGKILL, stderr[-2000:]


def test_ten_steps_kill_and_ten_more_are_twenty(tmp_path, texts, small_run):
    folder = tmp_path / "run"
    kill_at(13, folder / "checkpoints" / "10" / "manifest", texts)
    assert len(small.losses(folder)) == 13
    report = small.train(texts)
    assert (report["resumed_from"], report["steps"]) == (10, 20)
    check_equal(folder, small_run)


@pytest.mark.slow
def test_a_kill_while_a_checkpoint_is_written_loses_nothing_else(
    tmp_path, texts, small_run
):
    folder = tmp_path / "run"
    kill_at(10, folder, texts)
    assert small.train(texts)["resumed_from"] in (0, 10)
    check_equal(folder, small_run)


class SignalAt:
    """A TrainProgress that sends this process a signal once `step` is on show."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def __call__(self, *arguments, **options):
        progress = self.original(*arguments, **options)
        show = progress.update

        def update(step, *figures):
            show(step, *figures)
            if step == self.step:
                os.kill(os.getpid(), self.number)

        progress.update = update
        return progress

    def install(self, patch):
        self.original = conduct_module.TrainProgress
        patch.setattr(conduct_module, "TrainProgress", self)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_exits_0_and_loses_nothing(
    number, tmp_path, texts, small_run, monkeypatch, capsys
):
    folder = tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        SignalAt(6, number).install(patch)
        assert train_page.main([*small.flags(texts), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert signal.getsignal(number) is before
    assert report["stopped_by"] == signal.Signals(number).name
    stopped = report["steps"]
    assert 6 <= stopped < 10 and len(small.losses(folder)) == stopped
    assert find_checkpoint(str(folder)).step == stopped
    assert small.train(texts)["resumed_from"] == stopped
    check_equal(folder, small_run)


def stamps(folder):
    return {f: f.stat().st_mtime_ns for f in folder.rglob("*") if f.is_file()}


def test_a_finished_run_does_nothing_and_says_the_same(small_run, capsys, texts):
    texts = [*texts, f"run.dir={small_run}", "train.clip_norm=0.5"]
    before = stamps(small_run)
    assert train_page.main([*small.flags(texts), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(
        (small_run / "report.json").read_text()
    )
    assert "nothing to do" in printed.err
    assert stamps(small_run) == before, "config.toml included"


def test_a_run_killed_before_its_report_writes_it_at_the_next_start(
    small_run, tmp_path, texts
):
    import shutil

    shutil.copytree(small_run, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    report = small.train(texts)
    told = json.loads((small_run / "report.json").read_text())
    assert report["val_loss"] == told["val_loss"]
    assert report["steps"] == 20 and report["resumed_from"] == 20
    check_equal(tmp_path / "run", small_run)


def test_the_clock_stops_a_run_saved_scored_and_reported(tmp_path, texts):
    report = small.train([*texts, "train.max_minutes=1e-6"])
    folder = tmp_path / "run"
    assert report["stopped_by"] == "time" and report["steps"] == 1
    assert report["val_bits_per_byte"] > 0
    assert find_checkpoint(str(folder)).step == 1
    assert (folder / "report.html").is_file()


def test_other_text_cannot_go_on_in_the_folder(tmp_path, texts, small_run):
    import shutil

    from llmos_jax.errors import DataError

    shutil.copytree(small_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    other = tmp_path / "other.txt"
    other.write_text("Another text entirely. " * 400)
    with pytest.raises(DataError, match="tokens was"):
        small.train([*texts, f"data.train={other}"])
