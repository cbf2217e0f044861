"""Write and read checkpoints with Orbax: asynchronous, sharded, atomic.

A checkpoint is a folder `<step>/` with the items `params` and `optimizer` (arrays, each
shard written by the process that holds it), `manifest` and `tokenizer` (JSON). Orbax
writes under a temporary name and renames: a folder with a plain step number is whole.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llmos_jax.checkpoint.manifest import Manifest
from llmos_jax.errors import CheckpointError, LlmosError
from llmos_jax.units import format_bytes

# Every failure of a save is raised by `wait`, `save` or `close` and explained there;
# what its threads log besides (a traceback each) would bury that one line.
for _library in ("absl", "asyncio"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(
        self, folder: Path, *, keep: int | None = None, read_only: bool = False
    ):
        """Open a folder of checkpoints.

        Args:
            folder: holds one sub-folder per step; made if absent, unless read_only.
            keep: checkpoints to keep; None keeps all.
            read_only: nothing is written or cleaned up.
        """
        self.folder = folder.absolute()
        with _explained(f"checkpoints cannot be kept in {folder}"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_names=("params", "optimizer", "manifest", "tokenizer"),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=keep,
                    create=not read_only,
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,
                ),
            )

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, manifest: Manifest, params: Any, optimizer: Any, tokenizer_json: str
    ) -> None:
        """Start saving; the arrays are copied before this returns, then written behind.

        `optimizer` is None of a model that is not in training.

        Raises:
            CheckpointError: this save, or an earlier one still under way, failed; for
                example because the disk is full. Earlier checkpoints are untouched.
        """
        items = {
            "params": ocp.args.PyTreeSave(params),
            "manifest": ocp.args.JsonSave(manifest.to_json()),
            "tokenizer": ocp.args.JsonSave(json.loads(tokenizer_json)),
        }
        if optimizer is not None:
            items["optimizer"] = ocp.args.PyTreeSave(optimizer)
        with _explained(f"step {manifest.step} cannot be saved in {self.folder}"):
            self._manager.save(manifest.step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Block until everything saved is committed; raise what went wrong, if so."""
        with _explained(f"the last checkpoint in {self.folder} failed"):
            self._manager.wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        """Whether the processes of this run have agreed to stop at `step` (SIGTERM)."""
        return bool(self._manager.reached_preemption(step))

    def manifest(self, step: int) -> Manifest:
        """Read what checkpoint `step` is."""
        page = self._restore_json(step, "manifest")
        with _explained(f"checkpoint {self.folder / str(step)} cannot be read"):
            return Manifest.from_json(page)

    def tokenizer_json(self, step: int) -> str:
        """Read the tokenizer that checkpoint `step` carries."""
        return json.dumps(self._restore_json(step, "tokenizer"))

    def param_dtypes(self, step: int) -> dict[str, str]:
        """Read in which dtype each parameter is stored."""
        folder = self.folder / str(step)
        with _explained(f"checkpoint {folder} cannot be read"):
            found = ocp.PyTreeCheckpointHandler().metadata(folder / "params")
            tree = getattr(found, "tree", found)
            return {path: str(leaf.dtype) for path, leaf in tree.items()}

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """Read items onto the shardings of their abstract trees.

        Args:
            step: a committed step.
            abstract: `params=` and/or `optimizer=`, trees of ShapeDtypeStruct with
                shardings, of all that is stored or of a part; each shard is read by the
                process that needs it.
        """
        items = {
            name: ocp.args.PyTreeRestore(
                tree,
                restore_args=ocp.checkpoint_utils.construct_restore_args(tree),
                partial_restore=True,
            )
            for name, tree in abstract.items()
        }
        with _explained(f"checkpoint {self.folder / str(step)} cannot be read"):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in items}

    def close(self) -> None:
        """Finish what is under way and let go."""
        with _explained(f"the last checkpoint in {self.folder} failed"):
            self._manager.close()

    def _restore_json(self, step: int, item: str) -> dict[str, Any]:
        with _explained(f"checkpoint {self.folder / str(step)} cannot be read"):
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{item: ocp.args.JsonRestore()})
            )
            page = restored[item]
            if not isinstance(page, dict):
                raise CheckpointError(
                    f"checkpoint {self.folder / str(step)} cannot be read: its {item} "
                    "is damaged. Name an earlier step of the same run."
                )
        return page


def require_space(folder: Path, state: Any, keep: int) -> None:
    """Refuse to start where the checkpoints of this process will not fit.

    Needs room for `keep` + 1 copies of `state` (a new one is written before an old one
    goes), less what the folder holds already.

    Raises:
        CheckpointError: with the bytes needed and free.
    """
    leaves = jax.tree.leaves(state)
    needed = (keep + 1) * sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    held = 0
    if keep:
        held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < needed:
        raise CheckpointError(
            f"no disk space for checkpoints in {folder}: {format_bytes(needed)} wanted "
            f"({f'checkpoint.keep = {keep}, and ' * bool(keep)}one being written), "
            f"{format_bytes(free + held)} available. Free some, choose another "
            "run.dir, or keep fewer."
        )


def _hush_closed_loops() -> None:
    """Keep silent about TensorStore's late callbacks after a failed save.

    They come from C++ threads to an event loop that Orbax has closed by then; Python
    can only print them, and the save's own failure has been raised already.
    """
    shown = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    sys.unraisablehook = hook


_hush_closed_loops()


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever Orbax and TensorStore raise into one line."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as problem:
        text = str(problem)
        if isinstance(problem, LlmosError):
            reason = text.rstrip(".")
        elif getattr(problem, "errno", None) == errno.ENOSPC or "No space left" in text:
            reason = "the disk is full"
        elif isinstance(problem, OSError) and problem.strerror:
            reason = problem.strerror
        else:
            first = (text.splitlines() or [""])[0][:300]
            reason = f"{type(problem).__name__}: {first}"
        raise CheckpointError(
            f"{what}: {reason}. Checkpoints committed earlier are untouched."
        ) from problem
