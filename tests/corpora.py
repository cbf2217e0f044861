"""A small corpus made by hand, as the manifest's page describes it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from llmos_jax.data import bytes_tokenizer
from llmos_jax.data.corpus import MANIFEST, TOKENIZER, Corpus, Shard, Side

TEXTS = [f"Document {n} says {'tick tock ' * (n % 11)}é.\n" for n in range(240)]


def make_shard(path, texts, tokenizer, *, block_tokens=32):
    """Write one shard of documents, each begun by the mark; return its facts."""
    ids = [token for text in texts for token in (tokenizer.begin_id, *encode(text))]
    dtype = "<u2" if tokenizer.vocab_size < 1 << 16 else "<u4"
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for start in range(0, len(ids), block_tokens):
        writer.write(np.array(ids[start : start + block_tokens], dtype).tobytes())
    writer.close()
    return Shard(
        name=path.name,
        num_tokens=len(ids),
        num_bytes=sum(len(text.encode()) for text in texts),
        num_documents=len(texts),
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )


def encode(text):
    return bytes_tokenizer().encode(text).tolist()


def make_corpus(
    folder, texts=TEXTS, *, shards=3, block_tokens=32, tokenizer=None, test=False
) -> Path:
    """Write a corpus: every tenth text is validation, and with `test` the next one."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    tokenizer = tokenizer or bytes_tokenizer()
    held_out = {"validation": texts[::10]} | ({"test": texts[1::10]} if test else {})
    taken = {text for side in held_out.values() for text in side}
    train = [text for text in texts if text not in taken]
    sides = {}
    for name, mine in {"train": train, **held_out}.items():
        count = shards if name == "train" else 1
        sides[name] = Side(
            shards=tuple(
                make_shard(
                    folder / f"{name}-{number:05}.array_record",
                    mine[
                        len(mine) * number // count : len(mine) * (number + 1) // count
                    ],
                    tokenizer,
                    block_tokens=block_tokens,
                )
                for number in range(count)
            )
        )
        if name != "train":
            (folder / f"{name}.txt").write_text("".join(mine), encoding="utf-8")
    says_other = tokenizer.begin_id != tokenizer.eos_id
    corpus = Corpus(
        block_tokens=block_tokens,
        dtype="uint16",
        end_id=tokenizer.begin_id,
        stop_id=tokenizer.eos_id if says_other else None,
        tokenizer=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        held_out_by="every tenth, by hand",
        sides=sides,
        made_by={
            "files": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in folder.glob("*.txt")
            }
        },
    )
    (folder / TOKENIZER).write_text(tokenizer.to_json(), encoding="utf-8")
    (folder / MANIFEST).write_text(json.dumps(corpus.to_json()), encoding="utf-8")
    return folder


def flat_ids(texts):
    """The ids of documents end to end, each begun by the mark of `bytes`."""
    return [token for text in texts for token in (256, *encode(text))]
