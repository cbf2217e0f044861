"""Make a corpus: units -> texts -> sides -> shards -> manifest.

Everything is committed as it is finished, the manifest last. A folder with a manifest
is a whole corpus; one without is gone on with by the same command.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmos_jax.config.schema import DataSection, PrepareSection, RunConfig
from llmos_jax.corpus.duplicates import find_duplicates
from llmos_jax.corpus.jobs import JOB_BYTES, Text, cut_jobs
from llmos_jax.corpus.journal import (
    Journal,
    check_settings,
    committed,
    is_fresh,
    locked,
    remove_work,
)
from llmos_jax.corpus.report import source_key, source_rows, totals
from llmos_jax.corpus.settings import check, out_of, settings_of
from llmos_jax.corpus.shards import Written, write_shards
from llmos_jax.corpus.sides import SIDES, Split
from llmos_jax.corpus.sift import Part, Sifting, sift
from llmos_jax.corpus.units import Unit, cut_units, unit_bytes
from llmos_jax.corpus.workers import in_order, num_workers
from llmos_jax.data.corpus import BLOCK_TOKENS, MANIFEST, TOKENIZER, Corpus, Shard
from llmos_jax.data.tokenizer import Tokenizer, check_vocabulary
from llmos_jax.data.tokens import TRAINER_BYTES, given_tokenizer, with_template
from llmos_jax.data.trained import train_bpe
from llmos_jax.errors import DataError
from llmos_jax.interchange import ByteProgress

REPORT = "report.json"
_ORDER = ("test", "validation", "train")
"""In which sources are read: of duplicates the first stays, so that text which is held
out by name is never learned."""

Say = Callable[[str], None]


def make_corpus(
    config: RunConfig,
    *,
    own: Tokenizer | None,
    vocab_size: int,
    model_name: str,
    say: Say,
) -> dict[str, Any]:
    """Prepare the text of `[data]` as `[prepare]` says; return report.json.

    Args:
        config: `prepare.out` names the folder.
        own: the tokenizer that the model came with.
        vocab_size: the model's.
        model_name: for messages.
        say: told what is being done.

    Raises:
        ConfigError: no folder, conversations, or a tokenizer that does not fit.
        DataError: sources that cannot be read, a folder in use or begun otherwise, no
            room on the disk.
    """
    section, limits = config.data, config.prepare
    out = out_of(limits)
    check(section, limits, out)
    given = given_tokenizer(section.tokenizer, own)
    if given is not None:
        check_vocabulary(given, vocab_size, model_name)
        given = with_template(given, section)
    settings = settings_of(section, limits, given, vocab_size)
    with locked(out):
        if (out / MANIFEST).exists():
            return _finished(out, settings, say)
        if not is_fresh(out):
            say(f"going on with {out}")
        with closing(Journal(out, settings)) as journal:
            report = _make(out, config, given, vocab_size, journal, say)
        remove_work(out)
    return report


def _make(
    out: Path,
    config: RunConfig,
    given: Tokenizer | None,
    vocab_size: int,
    journal: Journal,
    say: Say,
) -> dict[str, Any]:
    section, limits = config.data, config.prepare
    clock = _Clock()
    units = [unit for side in _ORDER for unit in _units(section, side)]
    say(f"sifting {len(units)} units of text")
    entries, resumed = _sift_all(units, section, limits, journal)
    clock.lap("sift")
    parts = [Part(journal.work, number) for number in range(len(units))]
    say("looking for duplicates")
    fate = find_duplicates(
        parts, exact=limits.exact_duplicates, threshold=limits.near_duplicates
    )
    split = Split(units, parts, fate, section, limits.test_share)
    clock.lap("duplicates")
    tokenizer = _tokenizer(out, given, split, vocab_size, journal, say)
    clock.lap("tokenizer")
    files = [_write_texts(out, split, side, journal) for side in SIDES[1:]]
    written = _write(out, units, parts, split, tokenizer, limits, journal)
    clock.lap("encode")
    made_by = _made_by(section, journal.settings, [TOKENIZER, *files], out)
    corpus = _corpus(tokenizer, written, split.held_out_by, made_by)
    rows = source_rows(units, entries, parts, fate, written)
    report = {
        "out": str(out),
        "corpus": corpus.fingerprint,
        "held_out_by": split.held_out_by,
        "tokenizer": tokenizer.fingerprint,
        "total": totals(rows),
        "sides": {
            name: {
                "documents": side.num_documents,
                "bytes": side.num_bytes,
                "tokens": side.num_tokens,
                "shards": len(side.shards),
            }
            for name, side in corpus.sides.items()
        },
        "sources": rows,
        "resumed": {"units": resumed, "shards": written.resumed},
        "seconds": clock.laps,
        "workers": num_workers(limits.workers),
    }
    for name, plain in ((REPORT, report), (MANIFEST, corpus.to_json())):
        with committed(out / name) as file:
            file.write(json.dumps(plain, indent=1).encode() + b"\n")
    return report


def _sift_all(
    units: Sequence[Unit],
    section: DataSection,
    limits: PrepareSection,
    journal: Journal,
) -> tuple[list[dict[str, Any]], int]:
    """Return the counts of each unit, and how many units were sifted before."""
    left = [
        Sifting(
            number=number,
            unit=unit,
            limits=limits,
            text_key=section.text_key,
            folder=journal.work,
        )
        for number, unit in enumerate(units)
        if journal.get("unit", number) is None
    ]
    sizes = [unit_bytes(unit) for unit in units]
    through = sum(sizes) - sum(sizes[one.number] for one in left)
    with ByteProgress("sifting text") as bar:
        for one, counts in in_order(sift, left, num_workers(limits.workers)):
            journal.add("unit", one.number, facts=counts)
            through += sizes[one.number]
            bar.update(through, sum(sizes))
    entries = [journal.get("unit", number) for number in range(len(units))]
    return entries, len(units) - len(left)


def _tokenizer(
    out: Path,
    given: Tokenizer | None,
    split: Split,
    vocab_size: int,
    journal: Journal,
    say: Say,
) -> Tokenizer:
    """Return the tokenizer as it lies in the corpus, made now or before."""
    path = out / TOKENIZER
    if journal.get("tokenizer") is None:
        if given is None:
            say(f"training a tokenizer of {vocab_size} tokens")
            given = train_bpe(_first(split, TRAINER_BYTES), vocab_size)
        with committed(path) as file:
            file.write(given.to_json().encode())
        journal.add("tokenizer", facts=True)
    return Tokenizer.from_json(path.read_text(encoding="utf-8"))


def _write_texts(out: Path, split: Split, side: str, journal: Journal) -> str:
    """Keep the text of a held-out side, for compressors; return the file's name."""
    name = f"{side}.txt"
    if journal.get("text", side) is None and any(True for _ in split.slices(side)):
        with committed(out / name) as file:
            for one in split.slices(side):
                file.write(split.text(one).encode())
        journal.add("text", side, facts=True)
    return name


def _write(
    out: Path,
    units: Sequence[Unit],
    parts: Sequence[Part],
    split: Split,
    tokenizer: Tokenizer,
    limits: PrepareSection,
    journal: Journal,
) -> Written:
    texts = (
        (
            side,
            source_key(units[one.part]),
            Text(str(parts[one.part].texts), one.offset, one.size),
        )
        for side in ("validation", "test", "train")
        for one in split.slices(side)
    )
    total = sum(one.size for side in SIDES for one in split.slices(side))
    with ByteProgress("encoding text") as bar:
        return write_shards(
            out,
            cut_jobs(texts, tokenizer, min(JOB_BYTES, limits.shard_tokens)),
            tokenizer,
            journal,
            workers=num_workers(limits.workers),
            shard_tokens=limits.shard_tokens,
            on_progress=lambda done: bar.update(done, total),
        )


def _corpus(
    tokenizer: Tokenizer, written: Written, held_out_by: str, made_by: dict[str, Any]
) -> Corpus:
    says_other = tokenizer.begin_id != tokenizer.eos_id
    return Corpus(
        block_tokens=BLOCK_TOKENS,
        dtype="uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        end_id=tokenizer.begin_id,
        stop_id=tokenizer.eos_id if says_other else None,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        held_out_by=held_out_by,
        sides={side: written.sides[side] for side in SIDES if side in written.sides},
        made_by=made_by,
    )


def _finished(out: Path, settings: dict[str, Any], say: Say) -> dict[str, Any]:
    """Return the report of a whole corpus, if it is what is asked for.

    Raises:
        DataError: it is of other settings, or a shard was lost or altered since.
    """
    corpus = Corpus.from_json(json.loads((out / MANIFEST).read_bytes()))
    were = corpus.made_by["settings"]
    check_settings(out, {**were, "code": None}, {**settings, "code": None})
    damage = [
        shard.name
        for side in corpus.sides.values()
        for shard in side.shards
        if not _is_whole(out / shard.name, shard)
    ]
    if damage:
        raise DataError(
            f"{out} is finished, and {damage[0]} is missing or was altered since "
            f"({len(damage)} of its shards). Delete the folder, and run tools/prepare "
            "again: it makes the same shards."
        )
    remove_work(out)
    say(f"{out} is finished and whole: nothing to do.")
    report: dict[str, Any] = json.loads((out / REPORT).read_bytes())
    return {**report, "out": str(out)}


def _is_whole(path: Path, shard: Shard) -> bool:
    if not path.is_file() or path.stat().st_size != shard.size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256


def _made_by(
    section: DataSection,
    settings: dict[str, Any],
    names: Sequence[str],
    out: Path,
) -> dict[str, Any]:
    """Return where a corpus comes from, and the digests of what is not in shards."""
    return {
        "settings": settings,
        "sources": {side: list(_patterns(section, side)) for side in SIDES},
        "versions": {
            name: version(name) for name in ("ftfy", "rensa", "tokenizers", "numpy")
        },
        "files": {
            name: hashlib.sha256((out / name).read_bytes()).hexdigest()
            for name in names
            if (out / name).exists()
        },
    }


def _patterns(section: DataSection, side: str) -> tuple[str, ...]:
    found: tuple[str, ...] = getattr(section, side)
    return found


def _units(section: DataSection, side: str) -> list[Unit]:
    patterns = _patterns(section, side)
    return cut_units(side, patterns) if patterns else []


def _first(split: Split, num_bytes: int) -> Iterator[str]:
    for one in split.slices("train"):
        if num_bytes <= 0:
            return
        yield split.text(one)
        num_bytes -= one.size


class _Clock:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._since = time.monotonic()

    def lap(self, name: str) -> None:
        """The stage `name` ends now."""
        now = time.monotonic()
        self.laps[name] = round(now - self._since, 3)
        self._since = now
