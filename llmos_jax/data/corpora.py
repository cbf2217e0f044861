"""Open a prepared corpus: its tokenizer, and a stream of tokens for each side.

What the manifest says is held against what is there. Sizes are looked at every time;
the SHA-256 of a shard is taken once and remembered in the cache with the file's size
and time of change, since reading terabytes at every start would be the start. Whatever
is amiss is named at once, with the remedy.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmos_jax import stores
from llmos_jax.data.blocks import open_blocks
from llmos_jax.data.corpus import MANIFEST, TOKENIZER, Corpus, Side, num_blocks
from llmos_jax.data.stream import Spliced
from llmos_jax.data.tokenizer import Tokenizer
from llmos_jax.data.verify import Expected, check_files
from llmos_jax.errors import ConfigError, DataError
from llmos_jax.ir import fingerprint_of

_FETCHED_AT_ONCE = 4
"""Objects; each large one comes in parallel parts. A judgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSide:
    """A TokenStream of one side of a corpus."""

    name: str
    side: Side
    paths: tuple[Path, ...]
    """Of the shards, in order."""
    block_tokens: int
    dtype: str
    end_id: int | None
    stop_id: int | None
    raw: Path | None
    """The plain text; of held-out sides."""
    lengths: Path | None = None
    """uint32 [num_documents], tokens of each document, where they are to be packed."""

    @property
    def num_tokens(self) -> int:
        return self.side.num_tokens

    @property
    def num_bytes(self) -> int:
        return self.side.num_bytes

    @property
    def num_documents(self) -> int:
        return self.side.num_documents

    @property
    def fingerprint(self) -> str:
        """Of the shards' contents, wherever the corpus lies."""
        return fingerprint_of(
            [[shard.sha256, shard.num_tokens] for shard in self.side.shards]
        )

    @property
    def is_chat(self) -> bool:
        return False

    @property
    def num_answer_tokens(self) -> int | None:
        return None

    @property
    def num_skipped(self) -> int:
        return 0

    def open(self) -> Spliced:
        """The ids, read by place from the shards."""
        return open_blocks(
            self.paths,
            self.side.shards,
            block_tokens=self.block_tokens,
            dtype=self.dtype,
        )

    def open_weights(self) -> np.ndarray:
        raise AssertionError("text has no weights")

    def open_lengths(self) -> np.ndarray:
        """Return the tokens of each document, int64 [num_documents]."""
        assert self.lengths is not None, "lengths.py makes them"
        return np.fromfile(self.lengths, np.uint32).astype(np.int64)

    def raw_bytes(self) -> bytes:
        """Return the text itself; only of validation and test text."""
        assert self.raw is not None, "training text is not kept"
        return self.raw.read_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCorpus:
    """A corpus that was found whole."""

    name: str
    """As the config names it."""
    corpus: Corpus
    tokenizer: Tokenizer
    sides: dict[str, CorpusSide]

    @property
    def scored(self) -> CorpusSide:
        """The side that a finished model is scored on."""
        return self.sides["test"] if "test" in self.sides else self.sides["validation"]


def is_corpus(entry: str) -> bool:
    """Say whether an entry of `[data]` is the folder of a corpus.

    Raises:
        DataError: it is one that was never finished.
    """
    names = _names(entry)
    has_shards = any(name.endswith(".array_record") for name in names)
    if MANIFEST in names:
        return has_shards or TOKENIZER in names
    if has_shards:
        raise DataError(
            f"{entry} holds shards of a corpus and no {MANIFEST}: it was never "
            f"finished. Run tools/prepare again with prepare.out = {entry}."
        )
    return False


def _names(entry: str) -> set[str]:
    """What lies in a folder; nothing where it is none."""
    if stores.is_remote(entry):
        return set() if glob.has_magic(entry) else {*stores.list_names(entry)}
    folder = Path(entry).expanduser()
    try:
        return {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    except OSError as problem:
        raise DataError(f"data {entry} cannot be read: {problem}") from None


def open_corpus(
    entry: str, *, cache: Path, on_progress: Callable[[str], None]
) -> OpenCorpus:
    """Open the corpus that an entry of `[data]` names.

    Of one in an object store, all shards are copied here first, and checked here.

    Raises:
        DataError: it is damaged, or something of it is missing.
        StoreError: an object store does not answer, or there is no room for copies.
    """
    corpus, tokenizer = _read_manifest(entry)
    texts = {name: f"{name}.txt" for name in corpus.sides if name != "train"}
    shards = [shard.name for side in corpus.sides.values() for shard in side.shards]
    paths = _locate(entry, [*shards, *texts.values()])
    sides = {
        name: CorpusSide(
            name=name,
            side=side,
            paths=tuple(paths[shard.name] for shard in side.shards),
            block_tokens=corpus.block_tokens,
            dtype=corpus.dtype,
            end_id=corpus.end_id,
            stop_id=corpus.stop_id,
            raw=paths[texts[name]] if name in texts else None,
        )
        for name, side in corpus.sides.items()
    }
    check_files(entry, _expected(corpus, sides), cache=cache, on_progress=on_progress)
    return OpenCorpus(name=entry, corpus=corpus, tokenizer=tokenizer, sides=sides)


def _expected(corpus: Corpus, sides: dict[str, CorpusSide]) -> dict[Path, Expected]:
    """What the manifest says of each file."""
    stated = corpus.made_by.get("files", {})
    expected = {}
    for side in sides.values():
        for path, shard in zip(side.paths, side.side.shards):
            blocks = num_blocks(shard.num_tokens, corpus.block_tokens)
            expected[path] = Expected(
                size=shard.size, sha256=shard.sha256, num_blocks=blocks
            )
        if side.raw is not None:
            sha256 = stated.get(f"{side.name}.txt")
            expected[side.raw] = Expected(size=side.num_bytes, sha256=sha256)
    return expected


def _locate(entry: str, names: Sequence[str]) -> dict[str, Path]:
    """Return where the files of a corpus are here, by name; objects are copied."""
    if not stores.is_remote(entry):
        folder = Path(entry).expanduser()
        return {name: folder / name for name in names}
    objects = {one.url.rpartition("/")[2]: one for one in stores.list_files(entry)}
    lacking = [name for name in names if name not in objects]
    if lacking:
        raise DataError(
            f"corpus {entry} lacks {', '.join(lacking[:5])} ({len(lacking)} files). "
            "Copy it there again."
        )
    with ThreadPoolExecutor(_FETCHED_AT_ONCE) as pool:
        copies = pool.map(stores.local_copy, [objects[name] for name in names])
        return dict(zip(names, copies))


def _read_manifest(folder: str) -> tuple[Corpus, Tokenizer]:
    remedy = (
        f"Restore it, or delete the folder and run tools/prepare again with "
        f"prepare.out = {folder}."
    )
    try:
        paths = _locate(folder, [MANIFEST, TOKENIZER])
        corpus = Corpus.from_json(json.loads(paths[MANIFEST].read_bytes()))
        text = paths[TOKENIZER].read_text(encoding="utf-8")
        tokenizer = Tokenizer.from_json(text)
    except (OSError, ValueError, AttributeError, ConfigError) as problem:
        raise DataError(f"corpus {folder} cannot be read: {problem} {remedy}") from None
    if tokenizer.fingerprint != corpus.tokenizer:
        raise DataError(
            f"corpus {folder}: {TOKENIZER} is not the one that its tokens were made "
            f"with (fingerprint {tokenizer.fingerprint}, wanted {corpus.tokenizer}). "
            f"{remedy}"
        )
    lacking = [name for name in ("train", "validation") if name not in corpus.sides]
    if lacking:
        raise DataError(f"corpus {folder} has no {' and no '.join(lacking)} side.")
    return corpus, tokenizer
