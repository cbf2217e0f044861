"""Write and read checkpoints with Orbax: asynchronous, sharded, atomic.

A checkpoint is a folder `<step>/` with the items `params` and `optimizer` (arrays, each
shard written by the process that holds it), `manifest` and `tokenizer` (JSON). Orbax
writes under a temporary name and renames: a folder with a plain step number is whole.
Then `checksums.json` seals it (seal.py), behind the training step like the rest.

NOTE: among several processes a save that fails ends the run: the others wait for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llmos_jax.checkpoint.explain import damaged, explained
from llmos_jax.checkpoint.manifest import Manifest
from llmos_jax.checkpoint.retention import Retention
from llmos_jax.checkpoint.seal import faults, is_sealed, seal, size_faults
from llmos_jax.checkpoint.stored import Stored, read_all, stored_arrays
from llmos_jax.errors import CheckpointError, LlmosError

# Every failure of a save is raised by `wait`, `save` or `close` and explained there;
# what its threads log besides (a traceback each) would bury that one line.
for _library in ("absl", "asyncio"):
    logging.getLogger(_library).setLevel(logging.CRITICAL)


_TRASH = "trash"
"""Where old checkpoints are renamed to before they are deleted: a kill leaves no step
half deleted."""
_HUMBLE = 19
"""The least pressing of nice values (man 2 setpriority); Linux has one a thread."""
_UNFINISHED = ".orbax-checkpoint-tmp"
"""In the names of folders that Orbax has not renamed yet."""


class CheckpointStore:
    """The checkpoints of one run folder."""

    def __init__(
        self,
        folder: Path,
        *,
        retention: Retention | None = None,
        read_only: bool = False,
    ):
        """Open a folder of checkpoints.

        Args:
            folder: holds one sub-folder per step; made if absent, unless read_only.
            retention: which checkpoints are kept; None keeps all.
            read_only: nothing is written or cleaned up.
        """
        self.folder = folder.absolute()
        self.unsealed: list[str] = []
        """Why a checkpoint of this process has no checksums, a line each."""
        self._retention = retention or Retention()
        self._read_only = read_only
        self._sealer: threading.Thread | None = None
        self._took_s: list[float] = []
        self._figures: dict[int, dict[str, float]] = {}
        self._open()

    @property
    def save_s(self) -> float | None:
        """Median seconds from `save` to a checkpoint that is committed."""
        return statistics.median(self._took_s) if self._took_s else None

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written, or sealed, behind the caller."""
        return self._sealer is not None and self._sealer.is_alive()

    def path(self, step: int) -> Path:
        """Where checkpoint `step` lies."""
        return self.folder / str(step)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return sorted(self._manager.all_steps())

    def save(
        self, manifest: Manifest, params: Any, optimizer: Any, tokenizer_json: str
    ) -> None:
        """Start saving; the arrays are copied before this returns, then written behind,
        and sealed.

        `optimizer` is None of a model that is not in training. An earlier save that is
        still under way is waited for.

        Raises:
            CheckpointError: this save, or that earlier one, failed; for example because
                the disk is full. Earlier checkpoints are untouched, and the store can
                be used on (by one process; several must start again).
        """
        self.wait()
        self._sweep()
        items = {
            "params": ocp.args.PyTreeSave(params),
            "manifest": ocp.args.JsonSave(manifest.to_json()),
            "tokenizer": ocp.args.JsonSave(_parsed(tokenizer_json)),
        }
        if optimizer is not None:
            items["optimizer"] = ocp.args.PyTreeSave(optimizer)
        began = time.perf_counter()
        with self._usable_after(f"step {manifest.step} cannot be saved in"):
            self._figures[manifest.step] = manifest.metrics
            if not self._manager.save(manifest.step, args=ocp.args.Composite(**items)):
                raise CheckpointError(
                    f"step {manifest.step} cannot be saved in {self.folder}: it holds "
                    f"step {self.steps()[-1]} already."
                )
        self._sealer = threading.Thread(
            target=self._seal, args=(manifest.step, began), name="seal"
        )
        self._sealer.start()

    def wait(self) -> None:
        """Block until everything saved is committed and sealed; raise what went wrong,
        once."""
        with self._usable_after("the last checkpoint cannot be written to"):
            self._manager.wait_until_finished()
        self._join_sealer()

    def is_committed(self, step: int) -> bool:
        """Whether checkpoint `step` is whole on the disk; asks the disk alone, so that
        any thread may ask at any time."""
        return self.path(step).is_dir()

    def reached_preemption(self, step: int) -> bool:
        """Whether the processes of this run have agreed to stop at `step` (SIGTERM)."""
        return bool(self._manager.reached_preemption(step))

    def manifest(self, step: int) -> Manifest:
        """Read what checkpoint `step` is."""
        page = self._restore_json(step, "manifest")
        with explained(f"checkpoint {self.folder / str(step)} cannot be read"):
            return Manifest.from_json(page)

    def tokenizer_json(self, step: int) -> str:
        """Read the tokenizer that checkpoint `step` carries."""
        return json.dumps(self._restore_json(step, "tokenizer"))

    def param_dtypes(self, step: int) -> dict[str, str]:
        """Read in which dtype each parameter is stored."""
        return {path: x.dtype for path, x in self.arrays(step, "params").items()}

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
        with explained(f"checkpoint {self.folder / str(step)} cannot be read"):
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        return {name: restored[name] for name in items}

    def best(self, name: str | None, steps: list[int]) -> int | None:
        """The first of some steps in which a figure was lowest; None: none has it."""
        known = (
            {}
            if name is None
            else {step: self._figures_of(step).get(name) for step in steps}
        )
        figures = {step: x for step, x in known.items() if x is not None}
        return min(figures, key=lambda step: (figures[step], step), default=None)

    def is_sealed(self, step: int) -> bool:
        """Whether checkpoint `step` has checksums."""
        return is_sealed(self.path(step))

    def faults(self, step: int) -> list[str]:
        """What is wrong with checkpoint `step`, a line each, with the file's name.

        Every file is held against its checksum; of a checkpoint that is not sealed,
        every array and page is read.
        """
        if self.is_sealed(step):
            return faults(self.path(step))
        try:
            self.manifest(step)
            self.tokenizer_json(step)
            for item in ("params", "optimizer"):
                if (self.path(step) / item).is_dir():
                    read_all(self.path(step), item)
        except CheckpointError as problem:
            return [str(problem).split(": ", 1)[-1]]
        return []

    def check_sizes(self, step: int) -> None:
        """Refuse checkpoint `step` if a file is missing or of another size than was
        written; a look at the folder.

        Raises:
            CheckpointError: naming the first such file.
        """
        found = size_faults(self.path(step))
        if found:
            raise damaged(self.path(step), found)

    def arrays(self, step: int, item: str) -> dict[str, Stored]:
        """What is stored of `params` or `optimizer`, by name; reads no array."""
        return stored_arrays(self.path(step), item)

    def set_aside(self, step: int) -> Path:
        """Rename a damaged checkpoint, so that its step can be saved again.

        Returns:
            Where it lies from now on.

        Raises:
            CheckpointError: it cannot be renamed.
        """
        path = self.path(step)
        names = (f"{step}.damaged{more}" for more in ("", *range(2, 1000)))
        aside = next(one for name in names if not (one := self.folder / name).exists())
        with explained(f"checkpoint {path} cannot be set aside"):
            path.rename(aside)
            self._manager.reload()
        return aside

    def close(self) -> None:
        """Finish what is under way and let go."""
        with explained(f"the last checkpoint cannot be written to {self.folder}"):
            self._manager.close()
        self._join_sealer()
        self._sweep()

    def _open(self) -> None:
        with explained(f"checkpoints cannot be kept in {self.folder}"):
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers={
                    "params": _arrays(),
                    "optimizer": _arrays(),
                    "manifest": ocp.JsonCheckpointHandler(),
                    "tokenizer": ocp.JsonCheckpointHandler(),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._retention.policy(self._figures_of),
                    create=not self._read_only,
                    read_only=self._read_only,
                    todelete_subdir=None if self._read_only else _TRASH,
                ),
            )
        self._sweep()

    @contextlib.contextmanager
    def _usable_after(self, what: str) -> Iterator[None]:
        """After a failed save begin anew: what the manager believes is stale, and its
        temporary folders are in the way."""
        try:
            with explained(f"{what} {self.folder}"):
                yield
        except CheckpointError:
            self._join_sealer()
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):  # the failure was raised already
                    self._manager.close()
                self._open()
            raise

    def _seal(self, step: int, began: float) -> None:
        """Wait for the commit; then write checksums, by the first process for all."""
        try:
            self._manager.wait_until_finished()
        except Exception:  # raised in the thread that saves, too, and explained there
            return
        self._took_s.append(time.perf_counter() - began)
        if jax.process_index() > 0:
            return
        shutil.rmtree(self.folder / _TRASH, ignore_errors=True)
        with contextlib.suppress(OSError):  # training goes first, where they share
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _HUMBLE)
        try:
            seal(self.path(step))
        except OSError as problem:
            self.unsealed.append(
                f"checkpoint {self.path(step)} is whole, but has no checksums: "
                f"{problem.strerror}."
            )

    def _figures_of(self, step: int) -> dict[str, float]:
        """What is known of a step that this or another process saved.

        NOTE: reads the page itself; Orbax would wait for the save that is under way.
        """
        if step not in self._figures:
            try:
                page = json.loads((self.path(step) / "manifest/metadata").read_bytes())
                self._figures[step] = Manifest.from_json(page).metrics
            except (OSError, ValueError, LlmosError):  # damaged: not the best
                self._figures[step] = {}
        return self._figures[step]

    def _sweep(self) -> None:
        """Remove what a save that failed, or a kill, left: nothing is being written.

        NOTE: Orbax's own clean-up works behind the caller, and stumbles over a folder
        that goes meanwhile.
        """
        if self._read_only or jax.process_index() > 0:
            return
        for left in (self.folder / _TRASH, *self.folder.glob(f"*{_UNFINISHED}*")):
            shutil.rmtree(left, ignore_errors=True)

    def _join_sealer(self) -> None:
        if self._sealer is not None:
            self._sealer.join()
            self._sealer = None

    def _restore_json(self, step: int, item: str) -> dict[str, Any]:
        with explained(f"checkpoint {self.folder / str(step)} cannot be read"):
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


def _arrays() -> ocp.PyTreeCheckpointHandler:
    """How arrays are written; those of other formats are read by what they say.

    Random floats compress by 8 %, and zstd costs three times the processor time of
    writing them as they are, which training wants (README.md).
    """
    return ocp.PyTreeCheckpointHandler(use_zarr3=True, use_compression=False)


@functools.lru_cache(maxsize=1)
def _parsed(tokenizer_json: str) -> Any:
    """A run saves one tokenizer many times."""
    return json.loads(tokenizer_json)


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
