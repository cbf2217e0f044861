"""Mirror the checkpoints of a run in an object store: whole ones, in the background.

Orbax commits each checkpoint in a local folder; then its files are uploaded in parallel
under `URL/<step>/`, and last of all the page `URL/committed/<step>.json`: their sizes
and SHA-256s. A step without that page does not exist, however much of it lies there.
A step that is deleted loses its page first.

Orbax cannot do this itself: 0.12.8 refuses s3:// with OCDBT, and without it commits by
renaming a folder, which on S3 is a copy of object after object.

NOTE: the processes of one run must share the local folder, as Orbax asks of them; the
first one mirrors for all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmos_jax import stores
from llmos_jax.checkpoint.retention import Retention
from llmos_jax.errors import CheckpointError, StoreError
from llmos_jax.places import cache_folder

_FILES = 4
"""Files that move at a time; a large one in parallel parts besides. A judgement."""
_COMMITTED = "committed"
_OWNER = "run.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """What a store says of a step that is whole there.

    Attributes:
        step: its number.
        figures: of metrics.jsonl at that step.
        files: (bytes, SHA-256) by name below the step's folder.
    """

    step: int
    figures: Mapping[str, float]
    files: Mapping[str, tuple[int, str]]


class Mirror:
    """The checkpoints of one run in an object store."""

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        retention: Retention | None = None,
        say: Callable[[str], None] = lambda line: None,
        read_only: bool = False,
    ):
        """Open a mirror, take it over from an earlier run, remove what that left half.

        Args:
            url: `s3://bucket/...`; a folder for this run alone.
            folder: where Orbax commits, one sub-folder per step.
            retention: which steps stay in the store; None keeps all.
            say: told, in a line, what went wrong and will be tried again.
            read_only: nothing is written or removed there.

        Raises:
            StoreError: the store cannot be used.
        """
        self.url, self.folder = url.rstrip("/"), folder
        self._retention = retention or Retention()
        self._say = say
        self._token = uuid.uuid4().hex
        self._change = threading.Condition()
        self._waiting: set[int] = set()
        self._worker: threading.Thread | None = None
        self._problem: StoreError | None = None
        self._taken: StoreError | None = None
        self._pages: dict[int, Committed] = {}
        if not read_only:
            stores.write_bytes(f"{self.url}/{_OWNER}", self._token.encode())
            self._sweep()
        self._latest = max(self.steps(), default=None)

    @property
    def latest(self) -> int | None:
        """The newest step known to be whole in the store; asks nobody."""
        return self._latest

    def steps(self) -> list[int]:
        """Committed steps in the store, ascending."""
        names = stores.list_names(f"{self.url}/{_COMMITTED}")
        found = (name.removesuffix(".json") for name in names)
        return sorted(int(name) for name in found if name.isdigit())

    def catch_up(self) -> None:
        """Before a run goes on: bring the newest step if the store has a newer one than
        the local folder; else send what the folder has and the store lacks.

        Raises:
            CheckpointError: the store's newest step is damaged there.
            StoreError: it does not answer.
        """
        names = (path.name for path in self.folder.glob("*") if path.is_dir())
        mine = max((int(name) for name in names if name.isdigit()), default=None)
        if self._latest is not None and (mine is None or mine < self._latest):
            self.fetch(self._latest)
        elif mine is not None and mine != self._latest:
            self.push(mine)

    def push(self, step: int) -> None:
        """Begin to upload a committed step, and any that failed before it.

        Raises:
            StoreError: another run has taken over this place of the store.
        """
        with self._change:
            if self._taken is not None:
                raise self._taken
            self._waiting.add(step)
            self._start()

    def wait(self) -> None:
        """Block until the steps that were pushed are in the store.

        Raises:
            StoreError: the newest is not, after one more try.
        """
        self._join()
        if self._waiting and self._taken is None:
            with self._change:
                self._start()
            self._join()
        if self._taken is not None:
            raise self._taken
        step = max(self._waiting, default=-1)
        if step > (self._latest or 0):
            raise StoreError(
                f"checkpoint {step} is not in {self.url}: {self._problem} It is whole "
                f"in {self.folder / str(step)}; run again on the same folders, and it "
                "is sent again."
            ) from self._problem

    def fetch(self, step: int) -> Path:
        """Bring a step into the local folder, unless it is there; return its folder.

        What an earlier fetch had brought before it was killed is not fetched again.

        Raises:
            CheckpointError: it is not in the store, or damaged there.
            StoreError: the store does not answer; no room.
        """
        target = self.folder / str(step)
        if target.is_dir():
            return target
        with self._one_at_a_time():
            if not target.is_dir():
                self._fetch(step, target)
        return target

    def fetch_checked(self, step: int) -> Path:
        """The same; and one that is there already is held against its checksums."""
        target = self.folder / str(step)
        with self._one_at_a_time():
            if target.is_dir() and not _is_same(target, self._page(step)):
                shutil.rmtree(target)  # of an earlier run in this place, or damaged
            if not target.is_dir():
                self._fetch(step, target)
        return target

    def prune(self, keep: set[int]) -> None:
        """Delete the committed steps that are not in `keep`."""
        old = [step for step in self.steps() if step not in keep]
        for step in old:
            self._pages.pop(step, None)
            stores.delete(f"{self.url}/{_COMMITTED}/{step}.json")
        for step in old:
            stores.delete(f"{self.url}/{step}/")

    def _fetch(self, step: int, target: Path) -> None:
        page = self._page(step)
        room = self.folder / f".fetch-{step}"
        try:
            room.mkdir(parents=True, exist_ok=True)
            there = {
                remote.url.removeprefix(f"{self.url}/{step}/"): remote
                for remote in stores.list_files(f"{self.url}/{step}/")
            }
            with ThreadPoolExecutor(_FILES) as pool:
                list(
                    pool.map(
                        lambda name: self._bring(page, name, there.get(name), room),
                        page.files,
                    )
                )
            room.rename(target)
        except OSError as problem:
            raise CheckpointError(
                f"checkpoint {self.url}/{step} cannot be kept in {self.folder}: "
                f"{problem.strerror or problem}."
            ) from problem

    @contextlib.contextmanager
    def _one_at_a_time(self) -> Iterator[None]:
        """Let one process fetch into the folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / ".fetch.lock").open("w")
        except OSError as problem:
            raise CheckpointError(
                f"{self.folder} cannot be written: {problem.strerror}. Checkpoints of "
                f"{self.url} are fetched there."
            ) from problem
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _start(self) -> None:
        """Have a worker; the lock is held."""
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(
                target=self._work, name="mirror", daemon=True
            )
            self._worker.start()

    def _work(self) -> None:
        """Upload what waits, the newest first; leave what fails for the next time."""
        failed: set[int] = set()
        while True:
            with self._change:
                ready = [step for step in self._waiting if step not in failed]
                if not ready or self._taken is not None:
                    self._worker = None
                    return
                step = max(ready)
            try:
                done = self._upload(step)
            except StoreError as problem:
                failed.add(step)
                self._note(step, problem)
                continue
            with self._change:
                self._waiting.discard(step)
                failed.clear()
            if done:
                self._latest = max(step, self._latest or 0)
                self._retire()

    def _note(self, step: int, problem: StoreError) -> None:
        self._problem = problem
        if self._taken is None:
            self._say(
                f"warning: checkpoint {step} is not in {self.url} yet, and is sent "
                f"again with the next one: {problem}"
            )

    def _upload(self, step: int) -> bool:
        """Send a step and commit it; False if it is no more in the local folder."""
        source = self.folder / str(step)
        names: list[str] = []
        self._uncommit(step)
        try:
            paths = sorted(path for path in source.rglob("*") if path.is_file())
            names = [path.relative_to(source).as_posix() for path in paths]
            with ThreadPoolExecutor(_FILES) as pool:
                figures = _figures(source)
                digests = list(
                    pool.map(
                        lambda name: stores.upload(
                            source / name, f"{self.url}/{step}/{name}"
                        ),
                        names,
                    )
                )
            sizes = [path.stat().st_size for path in paths]
        except StoreError:
            if source.is_dir():
                raise
        except OSError as problem:
            if source.is_dir():
                raise StoreError(
                    f"{source} cannot be read: {problem.strerror}."
                ) from problem
        if not source.is_dir():
            stores.delete(f"{self.url}/{step}/")
            return False
        files = {
            name: (size, digest)
            for name, size, digest in zip(names, sizes, digests, strict=True)
        }
        self._check_whole(step, files)
        page = {"step": step, "figures": figures, "files": files}
        text = json.dumps({**page, "sha256": _digest_of(page)}, indent=1)
        stores.write_bytes(f"{self.url}/{_COMMITTED}/{step}.json", text.encode())
        return True

    def _uncommit(self, step: int) -> None:
        """Take back the page of a step that is about to be written anew."""
        self._pages.pop(step, None)
        url = f"{self.url}/{_COMMITTED}/{step}.json"
        if stores.exists(url):
            stores.delete(url)

    def _check_whole(self, step: int, files: Mapping[str, tuple[int, str]]) -> None:
        """Refuse to commit what another run has taken over, or removed from."""
        owner = stores.read_bytes(f"{self.url}/{_OWNER}").decode(errors="replace")
        if owner != self._token:
            self._taken = StoreError(
                f"another run writes its checkpoints to {self.url} since this one "
                "began. Give each run a checkpoint.dir of its own; what this one "
                f"saved lies in {self.folder}."
            )
            raise self._taken
        prefix = f"{self.url}/{step}/"
        there = {
            remote.url.removeprefix(prefix): remote.size
            for remote in stores.list_files(prefix)
        }
        for name, (size, _) in files.items():
            if there.get(name) != size:
                raise StoreError(f"{prefix}{name} was altered while it was uploaded.")

    def _retire(self) -> None:
        """Delete the steps that retention does not want; a failure is only said."""
        if self._retention.keep is None:
            return
        try:
            with ThreadPoolExecutor(_FILES) as pool:
                pages = list(pool.map(self._page, self.steps()))
            self.prune(_kept(self._retention, pages))
        except (StoreError, CheckpointError) as problem:
            self._say(f"warning: old checkpoints stay in {self.url}: {problem}")

    def _sweep(self) -> None:
        """Remove what lies there of steps that were never committed."""
        committed = set(self.steps())
        for name in stores.list_names(self.url):
            step = name.removesuffix("/")
            if name.endswith("/") and step.isdigit() and int(step) not in committed:
                stores.delete(f"{self.url}/{name}")

    def _page(self, step: int) -> Committed:
        if step not in self._pages:
            url = f"{self.url}/{_COMMITTED}/{step}.json"
            try:
                text = stores.read_bytes(url)
            except StoreError as problem:
                if stores.exists(url):
                    raise
                raise CheckpointError(
                    f"there is no checkpoint {step} in {self.url}. Committed there: "
                    f"{', '.join(map(str, self.steps())) or 'none'}."
                ) from problem
            self._pages[step] = _parse(url, text)
        return self._pages[step]

    def _bring(
        self, page: Committed, name: str, remote: stores.Remote | None, room: Path
    ) -> None:
        size, sha256 = page.files[name]
        where = f"{self.url}/{page.step}"
        if remote is None or remote.size != size:
            lacks = "is missing" if remote is None else "has another size"
            raise CheckpointError(
                f"checkpoint {where} is damaged: {name} {lacks}. Name an earlier step "
                "of the same run."
            )
        path = room / name
        if _digest_of_file(path) == sha256:
            return
        if stores.fetch_to(remote, path) != sha256:
            raise CheckpointError(
                f"checkpoint {where} is damaged: {name} was altered. Name an earlier "
                "step of the same run."
            )

    def _join(self) -> None:
        worker = self._worker
        if worker is not None:
            worker.join()


def bring(name: str) -> Path:
    """Fetch `s3://bucket/.../[STEP]`, the latest step by default, into the cache.

    Returns:
        The checkpoint's local folder, whose name is the step.

    Raises:
        CheckpointError: there is no committed checkpoint, or it is damaged.
        StoreError: the store does not answer, or refuses.
    """
    base, _, last = name.rstrip("/").rpartition("/")
    url = base if last.isdigit() else name.rstrip("/")
    place = hashlib.sha256(url.encode()).hexdigest()[:32]
    mirror = Mirror(url, cache_folder() / "checkpoints" / place, read_only=True)
    step = int(last) if last.isdigit() else mirror.latest
    if step is None:
        raise CheckpointError(
            f"{name} holds no committed checkpoint. Give the checkpoint.dir of a run, "
            "or a step in it."
        )
    return mirror.fetch_checked(step)


def _kept(retention: Retention, pages: list[Committed]) -> set[int]:
    """Which of these steps a retention wants; the newest always."""
    steps = sorted(page.step for page in pages)
    if retention.keep is None:
        return set(steps)
    kept = set(steps[-max(1, retention.keep) :])
    if retention.keep_every is not None:
        kept |= {step for step in steps if step % retention.keep_every == 0}
    if retention.best is not None:
        best = retention.best
        ranked = {page.step: page.figures.get(best, math.inf) for page in pages}
        known = [step for step in steps if not math.isinf(ranked[step])]
        kept |= set(sorted(known, key=lambda step: (ranked[step], -step))[:1])
    return kept


def _figures(folder: Path) -> dict[str, float]:
    """Read the figures of a local checkpoint: those of its Manifest."""
    try:
        page = json.loads((folder / "manifest" / "metadata").read_bytes())
        return {str(name): float(value) for name, value in page["metrics"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise StoreError(
            f"{folder}/manifest/metadata is damaged, and nothing of it was sent."
        ) from problem


def _parse(url: str, text: bytes) -> Committed:
    try:
        page: dict[str, Any] = json.loads(text)
        seal = page.pop("sha256")
        if seal != _digest_of(page):
            raise ValueError
        return Committed(
            step=int(page["step"]),
            figures=page["figures"],
            files={name: (int(n), str(d)) for name, (n, d) in page["files"].items()},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise CheckpointError(
            f"{url} is damaged. Name an earlier step of the same run."
        ) from problem


def _digest_of(page: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(page, sort_keys=True).encode()).hexdigest()


def _digest_of_file(path: Path) -> str | None:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None


def _is_same(folder: Path, page: Committed) -> bool:
    return all(
        _digest_of_file(folder / name) == sha256
        for name, (_, sha256) in page.files.items()
    )
