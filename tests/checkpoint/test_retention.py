"""What is kept of a run's checkpoints, and the room it takes."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import pytest

from llmos_jax.checkpoint import CheckpointStore, Manifest, Retention, find_checkpoint
from llmos_jax.errors import CheckpointError


def save_all(folder, spec, retention, figures):
    """Save steps 1, 2, ... with these figures; return the steps that are kept."""
    store = CheckpointStore(folder, retention=retention)
    for step, values in enumerate(figures, start=1):
        manifest = Manifest(
            step=step,
            model=spec,
            plan_fingerprint="",
            mesh={},
            data={},
            metrics=values,
        )
        store.save(manifest, {"w": jnp.full(4, float(step))}, None, "{}")
    store.close()
    return store.steps()


LOSSES = [{"val_loss": x} for x in (5.0, 2.0, 3.0, 4.0, 6.0, 7.0)]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), [1, 2, 3, 4, 5, 6]),
        (Retention(keep=2), [5, 6]),
        (Retention(keep=1, keep_every=2), [2, 4, 6]),
        (Retention(keep=1, keep_every=3), [3, 6]),
        (Retention(keep=1, best="val_loss"), [2, 6]),
        (Retention(keep=1, keep_every=3, best="val_loss"), [2, 3, 6]),
        (Retention(keep=2, best="other"), [5, 6]),
    ],
    ids=str,
)
def test_a_checkpoint_stays_while_something_wants_it(tmp_path, tiny, retention, kept):
    assert save_all(tmp_path, tiny, retention, LOSSES) == kept


def test_a_step_that_was_not_evaluated_is_not_the_best(tmp_path, tiny):
    figures = [{"val_loss": 3.0}, {"loss": 1.0}, {"val_loss": 4.0}, {"loss": 0.5}]
    kept = save_all(tmp_path, tiny, Retention(keep=1, best="val_loss"), figures)
    assert kept == [1, 4]


def test_the_best_is_known_after_a_restart(tmp_path, tiny):
    retention = Retention(keep=1, best="val_loss")
    save_all(tmp_path, tiny, retention, LOSSES[:3])
    store = CheckpointStore(tmp_path, retention=retention)
    manifest = find_checkpoint(str(tmp_path)).store.manifest(3)
    for step in (4, 5):
        page = manifest.to_json() | {"step": step, "metrics": {"val_loss": 9.0}}
        store.save(Manifest.from_json(page), {"w": jnp.ones(4)}, None, "{}")
    store.close()
    assert store.steps() == [2, 5]


@pytest.mark.parametrize(
    ("retention", "copies"),
    [
        (Retention(keep=3), 4),
        (Retention(keep=3, best="loss"), 5),
        (Retention(keep=1, keep_every=200), 7),
        (Retention(keep=1, keep_every=150), 5),
    ],
    ids=str,
)
def test_room_is_asked_for_all_that_is_kept(retention, copies):
    """1000 steps, saved every 100."""
    assert retention.copies(1000, 100) == copies


def test_nothing_is_left_of_a_step_that_went(tmp_path, tiny):
    save_all(tmp_path, tiny, Retention(keep=1), LOSSES)
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_what_a_kill_left_is_swept_up(tmp_path, tiny):
    save_all(tmp_path, tiny, Retention(keep=1), LOSSES)
    (tmp_path / "trash" / "5").mkdir(parents=True)
    (tmp_path / "7.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    CheckpointStore(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["6"]


def test_a_save_that_fails_leaves_a_store_that_works(tmp_path, tiny):
    store = CheckpointStore(tmp_path, retention=Retention(keep=2))
    manifest = Manifest(step=1, model=tiny, plan_fingerprint="", mesh={}, data={})
    store.save(manifest, {"w": jnp.ones(4)}, None, "{}")
    with pytest.raises(CheckpointError, match="step 1 .* holds step 1 already"):
        store.save(manifest, {"w": jnp.ones(4)}, None, "{}")
    with pytest.raises(CheckpointError, match="cannot be"):
        store.save(replace(manifest, step=2), {"w": object()}, None, "{}")
        store.wait()
    store.save(replace(manifest, step=2), {"w": jnp.ones(4)}, None, "{}")
    store.close()
    assert store.steps() == [1, 2]
