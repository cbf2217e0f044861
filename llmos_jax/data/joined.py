"""Several streams of tokens as one, end to end: the parts of a mixture."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llmos_jax.data.stream import Spliced, TokenStream
from llmos_jax.errors import DataError
from llmos_jax.ir import fingerprint_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A TokenStream of others, cut by one tokenizer.

    `TrainBatches` with weights draws rows from each part by itself; whatever else reads
    it sees one stream.
    """

    parts: tuple[TokenStream, ...]

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def num_tokens(self) -> int:
        return sum(part.num_tokens for part in self.parts)

    @property
    def num_bytes(self) -> int:
        return sum(part.num_bytes for part in self.parts)

    @property
    def num_documents(self) -> int:
        return sum(part.num_documents for part in self.parts)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([part.fingerprint for part in self.parts])

    @property
    def end_id(self) -> int | None:
        return self.parts[0].end_id

    @property
    def stop_id(self) -> int | None:
        return self.parts[0].stop_id

    @property
    def is_chat(self) -> bool:
        return self.parts[0].is_chat

    @property
    def num_answer_tokens(self) -> int | None:
        if not self.is_chat:
            return None
        return sum(part.num_answer_tokens or 0 for part in self.parts)

    @property
    def num_skipped(self) -> int:
        return sum(part.num_skipped for part in self.parts)

    def open(self) -> Spliced:
        """The ids of all parts."""
        opened = [part.open() for part in self.parts]
        return Spliced([len(ids) for ids in opened], opened.__getitem__)

    def open_weights(self) -> Spliced:
        """The weights of all parts; only of conversations."""
        opened = [part.open_weights() for part in self.parts]
        return Spliced([len(weights) for weights in opened], opened.__getitem__)

    def open_lengths(self) -> np.ndarray:
        """Tokens of each conversation of all parts."""
        return np.concatenate([part.open_lengths() for part in self.parts])

    def raw_bytes(self) -> bytes:
        """The text of all parts; only of validation and test text."""
        return b"".join(part.raw_bytes() for part in self.parts)


def join(parts: tuple[TokenStream, ...]) -> TokenStream:
    """Return the parts as one stream; one part is itself.

    Raises:
        DataError: some are conversations and some are text.
    """
    if len({part.is_chat for part in parts}) > 1:
        raise DataError(
            "data.train names conversations and plain text together: of the first only "
            "answers are learned, of the second everything. Train on one after the "
            "other, or set data.format = `text` to learn all of both."
        )
    return parts[0] if len(parts) == 1 else Joined(parts=parts)
