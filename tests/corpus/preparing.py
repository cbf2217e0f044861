"""Texts that no filter minds, a way to prepare them, and what a corpus then holds."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import small
from array_record.python.array_record_module import ArrayRecordReader

from llmos_jax import driver
from llmos_jax.data.corpus import Corpus

_LETTERS = "etaoinshrdlu"
END = 256
"""The mark of `data.tokenizer = bytes`."""


def prose(seed: int, words: int = 60) -> str:
    """A text of random words, in lines of twelve: nothing in it comes twice."""
    draw = random.Random(seed)
    drawn = [
        "".join(draw.choices(_LETTERS, k=draw.randint(3, 9))) for _ in range(words)
    ]
    return "\n".join(" ".join(drawn[at : at + 12]) for at in range(0, words, 12))


def write_rows(path: Path, texts: list[str]) -> Path:
    """A .jsonl of texts."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def settings(out: Path, model: Path, *patterns: Any, **more: Any) -> list[str]:
    """`--set` texts; `a__b=1` sets a.b."""
    values = {
        "model": model,
        "data.train": json.dumps([str(one) for one in patterns]),
        "data.tokenizer": "bytes",
        "data.validation_share": 0.1,
        "prepare.out": out,
        "prepare.workers": 2,
    }
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in values.items()]


def prepare(out: Path, model: Path, *patterns: Any, **more: Any) -> dict[str, Any]:
    """Make a corpus here; return the report."""
    return driver.prepare(small.config_of(settings(out, model, *patterns, **more)))


def manifest(out: Path) -> Corpus:
    return Corpus.from_json(json.loads((out / "manifest.json").read_text()))


def ids(out: Path, side: str) -> np.ndarray:
    """All token ids of a side, from its records."""
    corpus = manifest(out)
    records = []
    for shard in corpus.sides[side].shards:
        found = ArrayRecordReader(str(out / shard.name)).read_all()
        read = [np.frombuffer(record, corpus.dtype) for record in found]
        assert all(one.size == corpus.block_tokens for one in read[:-1])
        assert sum(one.size for one in read) == shard.num_tokens
        records += read
    return np.concatenate(records)


def texts(out: Path, side: str) -> list[str]:
    """The documents of a side of a corpus made with `data.tokenizer = bytes`."""
    found = ids(out, side)
    starts = np.flatnonzero(found == END)
    assert starts[0] == 0
    return [
        found[start + 1 : end].astype(np.uint8).tobytes().decode()
        for start, end in zip(starts, [*starts[1:], found.size])
    ]


def all_texts(out: Path) -> list[str]:
    return [text for side in manifest(out).sides for text in texts(out, side)]
