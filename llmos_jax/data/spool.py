"""Set documents aside on disk: each source is read once, and memory stays small."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType


class Spool:
    """The texts of documents, one after another in a file; write, then read."""

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("w+b")
        self._lengths = array("Q")

    def add(self, text: str) -> None:
        """Append one document."""
        raw = text.encode()
        self._file.write(raw)
        self._lengths.append(len(raw))

    def __iter__(self) -> Iterator[str]:
        self._file.seek(0)
        for length in self._lengths:
            yield self._file.read(length).decode()

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    @property
    def num_bytes(self) -> int:
        return sum(self._lengths)

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
