"""Kill, stop and spoil real runs: each goes on from its last good save.

The runs are processes of their own, on one device, and share compiled programs.
"""

from __future__ import annotations

import functools
import json
import random
import re
import shutil
import signal
import textwrap
import time

import pytest
import small

from llmos_jax.checkpoint import find_checkpoint, inspect

TRAIN = "import sys; from llmos_jax import train; sys.exit(train.main(sys.argv[1:]))"
PATIENCE_S = 240
"""For a process on a machine that others use, too."""
STEPS, EVERY = 18, 3

SLOWER = textwrap.dedent(
    """
    import importlib, sys, time
    from llmos_jax import train
    conduct = importlib.import_module("llmos_jax.training.conduct")

    class Progress(conduct.TrainProgress):
        def update(self, step, *figures):
            super().update(step, *figures)
            time.sleep({seconds})

    conduct.TrainProgress = Progress
    sys.exit(train.main(sys.argv[1:]))
    """
)
SLOW_SCORES = textwrap.dedent(
    """
    import sys, time
    from llmos_jax import train
    from llmos_jax.training.scorer import Scorer

    whole = Scorer.sums

    def sums(self, *arguments, on_progress=None, **named):
        def tell(*figures):
            open({seen!r}, "w").close()
            time.sleep(1)
            if on_progress is not None:
                on_progress(*figures)

        return whole(self, *arguments, on_progress=tell, **named)

    Scorer.sums = sums
    sys.exit(train.main(sys.argv[1:]))
    """
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory, small_model, text_file):
    """Folder -> `--set` texts of a run of quick steps, every third saved."""

    def texts(folder, **more):
        values = {"train__steps": STEPS, "checkpoint__every": EVERY, **more}
        return small.overrides(folder, small_model, text_file, **values)

    return texts


@pytest.fixture(scope="module")
def begin(tmp_path_factory):
    """Start `train` in a process."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def start(texts, code=TRAIN, *flags):
        words = ["-c", code, *small.flags(texts), *flags]
        return small.start(words, devices=1, LLMOS_CACHE=cache)

    return start


def run_to_end(process):
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err[-3000:]
    return out, err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, settings, begin):
    """Number of steps -> the folder of a run that nothing disturbs."""

    @functools.cache
    def run(steps):
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        run_to_end(begin(settings(folder, train__steps=steps)))
        return folder

    return run


def kill_somewhere(process, folder, chance):
    """Kill -9 at a moment that chance chooses: while a checkpoint is being written,
    while rows are, or anywhere from the start of the process on."""
    moment = chance.choice(["saving", "stepping", "any"])
    wait_s = chance.uniform(0.0, 0.15 if moment != "any" else 6.0)
    rows = folder / "metrics.jsonl"
    size = rows.stat().st_size if rows.exists() else 0

    def is_time():
        if moment == "saving":
            return any((folder / "checkpoints").glob("*.orbax-checkpoint-tmp*"))
        if moment == "stepping":
            return rows.exists() and rows.stat().st_size > size
        return True

    until = time.monotonic() + PATIENCE_S
    while process.poll() is None and not is_time() and time.monotonic() < until:
        time.sleep(0.002)
    time.sleep(wait_s)
    process.kill()
    process.communicate()
    return moment


def committed(folder):
    names = (path.name for path in (folder / "checkpoints").glob("*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def check_equal(folder, straight):
    assert small.losses(folder) == small.losses(straight)
    assert small.differing(small.arrays(folder), small.arrays(straight)) == []
    ours, theirs = find_checkpoint(str(folder)), find_checkpoint(str(straight))
    data = [one.store.manifest(one.step).data for one in (ours, theirs)]
    assert data[0] == data[1], "the place in the data"
    assert inspect(str(folder))["damaged"] == []


@pytest.mark.parametrize(
    ("kills", "steps"),
    [(3, STEPS), pytest.param(50, 180, marks=pytest.mark.slow)],
    ids=["few", "fifty"],
)
def test_kills_at_random_moments_lose_nothing(
    kills, steps, tmp_path, settings, begin, undisturbed
):
    chance, folder = random.Random(kills), tmp_path / "run"
    texts = settings(folder, train__steps=steps)
    moments, saved = [], [0]
    for _ in range(kills):
        process = begin(texts, SLOWER.format(seconds=0.1))
        moments.append(kill_somewhere(process, folder, chance))
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        saved.append(committed(folder))
        assert saved[-1] >= saved[-2], "a committed step went"
    print(f"killed while {moments}, saved {saved}")
    out, _ = run_to_end(begin(texts, TRAIN, "--json"))
    assert json.loads(out)["resumed_from"] == saved[-1]
    assert len(set(moments)) > 1
    assert len(small.losses(folder)) == steps
    check_equal(folder, undisturbed(steps))


def wait_for(process, path, holds=lambda path: path.exists()):
    until = time.monotonic() + PATIENCE_S
    while not holds(path):
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < until, f"{path} never came"
        time.sleep(0.02)


def test_sigterm_before_the_first_step_ends_at_once_and_says_so(
    tmp_path, settings, begin
):
    folder = tmp_path / "run"
    process = begin(settings(folder), TRAIN, "--json")
    wait_for(process, folder / "plan.json")
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    out, err = process.communicate(timeout=PATIENCE_S)
    assert json.loads(out) == {"stopped_by": "SIGTERM"}
    assert time.monotonic() - began < 5, "no wait for the compiler"
    assert process.returncode == 0, err
    assert "stopped by SIGTERM. Nothing had been trained yet; run again on" in err
    assert "Traceback" not in err


def test_sigterm_is_obeyed_in_time_or_the_loss_is_named(tmp_path, settings, begin):
    """Steps that take longer than the machine gives."""
    folder = tmp_path / "run"
    texts = settings(folder, checkpoint__grace_s=2, checkpoint__every=2)
    process = begin(texts, SLOWER.format(seconds=6))
    wait_for(process, folder / "checkpoints" / "2" / "checksums.json")
    wait_for(
        process,
        folder / "metrics.jsonl",
        lambda path: len(path.read_text().splitlines()) == 3,
    )
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, err = process.communicate(timeout=PATIENCE_S)
    assert time.monotonic() - began < 4
    assert process.returncode == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("error:")]
    assert re.search(
        r"SIGTERM: step \d was not saved in time \(checkpoint.grace_s = 2\); the last "
        r"whole checkpoint is step 2, .* A save takes ",
        line,
    )
    assert "Traceback" not in err


@pytest.mark.slow
def test_sigterm_during_an_evaluation_saves(tmp_path, settings, begin):
    """The evaluation is given up, not the steps."""
    folder = tmp_path / "run"
    texts = settings(folder, train__eval_every=5, checkpoint__every=50)
    code = SLOW_SCORES.format(seen=str(tmp_path / "evaluating"))
    process = begin(texts, code, "--json")
    wait_for(process, tmp_path / "evaluating")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    assert json.loads(out)["stopped_by"] == "SIGTERM"
    assert committed(folder) == 5


def test_a_second_run_on_the_folder_is_refused_and_a_kill_frees_it(
    tmp_path, settings, begin
):
    folder = tmp_path / "run"
    first = begin(settings(folder), SLOWER.format(seconds=1))
    wait_for(first, folder / "checkpoints" / "3" / "checksums.json")
    second = begin(settings(folder))
    out, err = second.communicate(timeout=PATIENCE_S)
    assert second.returncode == 2 and out == ""
    assert f"{folder} is in use: process {first.pid} on " in err
    assert first.poll() is None, "the first one is not disturbed"
    first.kill()
    first.communicate()
    assert (folder / "lock").exists(), "nobody could remove it"
    run_to_end(begin(settings(folder)))
    assert committed(folder) == STEPS and not (folder / "lock").exists()


def test_a_run_goes_on_over_a_damaged_step_and_saves_it_again(
    tmp_path, settings, begin, undisturbed
):
    folder, straight = tmp_path / "run", undisturbed(STEPS)
    shutil.copytree(straight, folder)
    (folder / "report.json").unlink()
    page = folder / "checkpoints" / str(STEPS) / "manifest" / "metadata"
    page.write_bytes(page.read_bytes()[:50])
    process = begin(settings(folder))
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert f"checkpoint {page.parents[1]} is damaged: manifest/metadata is cut" in err
    _, err = run_to_end(begin(settings(folder, checkpoint__on_damage="previous")))
    assert f"the run goes on from step {STEPS - EVERY}" in err
    assert (folder / "checkpoints" / f"{STEPS}.damaged").is_dir()
    check_equal(folder, straight)
