"""What a teacher says of the rows of a text, kept on disk: the likeliest tokens of each
position.

A row is found by a hash of its tokens (and of the numbers of their documents), so that
later epochs, a run that goes on and other students find it whatever their order is. A
file holds some rows and is named by its own SHA-256; it appears whole or not at all. A
pass that was killed goes on with the rows that are missing.

B sequences, T tokens, k kept tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llmos_jax.errors import DataError
from llmos_jax.training.lesson import KEPT

Batch = dict[str, np.ndarray]
Ask = Callable[[Batch], Batch]
"""Batch -> KEPT of it: what the teacher says."""

PAGE = "teacher.json"
SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Whose answers a folder keeps, and how much of them."""

    teacher: str
    """Its name, for people."""
    fingerprint: str
    """Of the teacher."""
    tokenizer: str
    """A fingerprint of the vocabulary."""
    top_k: int
    vocab_size: int
    """Tokens that probabilities are over: those that teacher and student have."""
    dtype: str
    """In which the teacher computed."""


class Source(Protocol):
    """An endless iterator of batches that can be asked for any step."""

    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def __next__(self) -> dict[str, Any]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


class Answers:
    """A folder of answers, open to be read and added to."""

    def __init__(self, folder: Path, asked: Asked, say: Callable[[str], None]):
        """Open or make a folder; every file in it is checked.

        Raises:
            DataError: it keeps another teacher's answers, or cannot be written.
        """
        self._folder, self._asked, self._say = folder, asked, say
        self._where: dict[bytes, tuple[Batch, int]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check_page()
            for path in sorted(folder.glob(f"*{SUFFIX}")):
                self._open(path)
        except OSError as problem:
            raise DataError(
                f"distill.cache = {folder} cannot be used: {problem.strerror}. Name "
                "another folder."
            ) from None

    def __contains__(self, key: bytes) -> bool:
        return key in self._where

    def __len__(self) -> int:
        return len(self._where)

    def of(self, batch: Batch) -> Batch:
        """KEPT of the rows of a batch, all of which are here."""
        found = [self._where[key] for key in keys_of(batch)]
        made = {
            name: np.stack([arrays[name][row] for arrays, row in found])
            for name in KEPT
        }
        return {**made, KEPT[0]: made[KEPT[0]].astype(np.int32)}

    def add(self, keys: list[bytes], answers: Batch) -> None:
        """Keep the answers to some rows: they are on disk when this returns."""
        from safetensors.numpy import save

        ids = answers[KEPT[0]]
        is_small = self._asked.vocab_size <= 1 << 16
        arrays = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1),
            KEPT[0]: ids.astype(np.uint16 if is_small else np.int32),
            KEPT[1]: answers[KEPT[1]].astype(np.float16),
            KEPT[2]: answers[KEPT[2]].astype(np.float32),
        }
        content = save({name: np.ascontiguousarray(x) for name, x in arrays.items()})
        path = self._folder / (hashlib.sha256(content).hexdigest() + SUFFIX)
        _write(path, content)
        self._open(path)

    def _check_page(self) -> None:
        path = self._folder / PAGE
        wanted = asdict(self._asked)
        if not path.exists():
            _write(path, (json.dumps(wanted, indent=1) + "\n").encode())
            return
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = {}
        if {**found, "teacher": ""} == {**wanted, "teacher": ""}:
            return
        differing = [name for name in wanted if found.get(name) != wanted[name]]
        details = ", ".join(
            f"{name} {found.get(name)} and not {wanted[name]}" for name in differing
        )
        raise DataError(
            f"distill.cache = {self._folder} keeps what another teacher said "
            f"({details}). Name another folder, or delete that one."
        )

    def _open(self, path: Path) -> None:
        """Take a file's rows; a damaged file is set aside, and its rows are missing."""
        from safetensors.numpy import load_file

        if hashlib.sha256(path.read_bytes()).hexdigest() != path.name[: -len(SUFFIX)]:
            path.rename(path.with_suffix(".damaged"))
            self._say(
                f"warning: {path} is damaged and set aside; the teacher is asked for "
                "its rows again"
            )
            return
        arrays = load_file(path)
        for row, key in enumerate(arrays.pop("keys")):
            self._where[key.tobytes()] = (arrays, row)


def keys_of(batch: Batch) -> list[bytes]:
    """A hash of what a teacher sees of each row."""
    return [
        hashlib.blake2b(
            b"".join(
                np.ascontiguousarray(batch[name][row], np.int32).tobytes()
                for name in ("inputs", "segments")
                if name in batch
            ),
            digest_size=16,
        ).digest()
        for row in range(len(batch["inputs"]))
    ]


def collect(
    answers: Answers,
    source: Source,
    *,
    batches: int,
    rows: int,
    ask: Callable[[], Ask],
    on_progress: Callable[[int, int], None],
) -> int:
    """Ask a teacher for what is missing of the next batches; return how many rows.

    Args:
        answers: to add to.
        source: of the batches.
        batches: how many of them the run will need.
        rows: that the teacher takes at once.
        ask: opens the teacher; called if there is something to ask.
        on_progress: is told of every batch that was looked at.
    """
    waiting: dict[bytes, Batch] = {}
    asked: Ask | None = None
    count = 0

    def put() -> None:
        nonlocal asked, count
        asked = asked or ask()
        count += len(waiting)
        few = list(waiting.values())
        few += [few[-1]] * (rows - len(few))
        whole = {name: np.stack([row[name] for row in few]) for name in few[0]}
        found = {name: x[: len(waiting)] for name, x in asked(whole).items()}
        answers.add(list(waiting), found)
        waiting.clear()

    for done in range(1, batches + 1):
        batch = next(source)
        for row, key in enumerate(keys_of(batch)):
            if key not in answers and key not in waiting:
                waiting[key] = {
                    name: batch[name][row]
                    for name in ("inputs", "segments")
                    if name in batch
                }
                if len(waiting) == rows:
                    put()
        on_progress(done, batches)
    if waiting:
        put()
    return count


class WithAnswers:
    """Batches of a source, with a teacher's answers beside them."""

    def __init__(self, source: Source, answers: Answers):
        self._source, self._answers = source, answers

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._source)
        return {**batch, **self._answers.of(batch)}

    def get_state(self) -> dict[str, Any]:
        """The source's."""
        return self._source.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """The source's."""
        self._source.set_state(state)


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and survives a power cut."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
    with fresh.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
