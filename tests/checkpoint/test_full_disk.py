"""A disk that is really full: one error line, and what was saved stays whole."""

from __future__ import annotations

import subprocess
import textwrap
import time
from pathlib import Path

import pytest
import small

from llmos_jax import train as train_page
from llmos_jax.checkpoint import find_checkpoint


@pytest.fixture
def disk(tmp_path):
    """A file system of 24 MiB, where this machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no `mount` on this machine")
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


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

    conduct.TrainProgress = Progress
    sys.exit(train.main({arguments!r}))
    """
)


def test_a_disk_that_fills_up_ends_the_run_and_keeps_what_was_saved(
    disk, small_model, text_file
):
    """A process of its own: what threads print must not bury the one line."""
    run = disk / "run"
    texts = small.overrides(run, small_model, text_file)
    process = small.start(
        FILLED_AT_12.format(
            here=str(Path(__file__).parent),
            saved=str(run / "checkpoints" / "10" / "manifest"),
            disk=str(disk),
            arguments=small.flags(texts),
        )
    )
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
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
