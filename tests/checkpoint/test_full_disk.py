"""A disk that is really full: one error line, and what was saved stays whole."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest
import small
from small_disk import small_disk

from llmos_jax import train as train_page
from llmos_jax.checkpoint import find_checkpoint, inspect


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 24) as folder:
        yield folder


def fill(folder):
    """Take every byte that is left."""
    with (folder / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass
        try:
            while True:
                file.write(b"x")
        except OSError:
            pass


def wait_for(path):
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} was never committed")


def error_line(text):
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


FILLED_AT_12 = textwrap.dedent(
    """
    import importlib, sys
    from pathlib import Path
    sys.path.insert(0, {here!r})
    from test_full_disk import fill, wait_for
    from llmos_jax import train
    conduct = importlib.import_module("llmos_jax.training.conduct")

    class Progress(conduct.TrainProgress):
        def update(self, step, *figures):
            super().update(step, *figures)
            if step == 12:
                wait_for(Path({saved!r}))
                fill(Path({disk!r}))
            if step == {freed_at}:
                Path({disk!r}, "filler").unlink()

    conduct.TrainProgress = Progress
    sys.exit(train.main({arguments!r}))
    """
)


def run_on(disk, texts, freed_at=None):
    """A process of its own: what threads print must not bury the one line."""
    process = small.start(
        FILLED_AT_12.format(
            here=str(Path(__file__).parent),
            saved=str(disk / "run" / "checkpoints" / "10" / "checksums.json"),
            disk=str(disk),
            freed_at=freed_at,
            arguments=small.flags(texts),
        )
    )
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_training_goes_on_while_the_disk_is_full(
    disk, tmp_path, small_model, text_file
):
    run = disk / "run"
    more = {"train__steps": 40, "checkpoint__keep": 2}
    code, _, err = run_on(
        disk, small.overrides(run, small_model, text_file, **more), freed_at=24
    )
    assert code == 0, err
    warnings = [line for line in err.splitlines() if "is not saved" in line]
    assert len(warnings) == 1 and "step 20" in warnings[0], err
    assert "disk is full" in warnings[0] and "Traceback" not in err
    assert "rows wait in memory" in err
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["30", "40"], "nothing is left of the save that failed"
    straight = small.overrides(tmp_path / "run", small_model, text_file, **more)
    small.train(straight)
    assert small.losses(run) == small.losses(tmp_path / "run")
    assert small.differing(small.arrays(run), small.arrays(tmp_path / "run")) == []
    assert inspect(str(run))["damaged"] == []


@pytest.mark.slow
def test_a_disk_that_stays_full_ends_the_run_and_keeps_what_was_saved(
    disk, small_model, text_file
):
    run = disk / "run"
    texts = small.overrides(run, small_model, text_file)
    code, out, err = run_on(disk, texts)
    assert code == 1, err
    line = error_line(err)
    assert "disk is full" in line or "No space left" in line
    assert out == ""
    assert find_checkpoint(str(run)).step == 10
    assert len(small.arrays(run, 10)) > 20
    (disk / "filler").unlink()
    assert small.train(texts)["resumed_from"] == 10


def test_a_disk_too_small_is_told_before_the_first_step(
    disk, small_model, text_file, capsys
):
    texts = small.overrides(disk / "run", small_model, text_file, checkpoint__keep=100)
    assert train_page.main(small.flags(texts)) == 1
    line = error_line(capsys.readouterr().err)
    assert "no disk space" in line and "checkpoint.keep = 100" in line
    assert not (disk / "run" / "metrics.jsonl").exists()
