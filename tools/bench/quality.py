#!/usr/bin/env python3
"""How far models in few bits are from the float model, ours and llama.cpp's.

    .venv/bin/python tools/bench/quality.py --text FILE [--model smollm2]
        [--models DIR ...] [--chunks 40] [--json]

Counted as llama-perplexity does: the text is cut into chunks of 512 tokens that lie end
to end (each begins with the mark that begins texts, for models that have one), and of
each chunk the last 255 tokens are scored, which have half a chunk before them. For
each model: the change of perplexity, the mean Kullback-Leibler divergence of its
predictions from ours in float32 with its standard error, and how often the most likely
token is the same. The ids and the weights are the same for all. Ours run through the
very programs that `generate` and tools/bench/decode.py run; an int8 cache is read back
by every token.

--model: smollm2 or gemma3 (tools/get-model), or anything with weights. --models: models
over the same vocabulary, for example checkpoints that `compress` made of it:

    llmos compress MODEL --out DIR --set compress.weights=int4 --set compress.group=32
        --set compress.method=gptq --set compress.clip=true
        --set 'compress.calibration=["TEXT"]' --set 'data.test=["OTHER"]'

llama.cpp comes from LLMOS_PEERS_PYTHON, as in decode.py.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import few_bits
import jax
import jax.numpy as jnp
import numpy as np
from workers import Worker, note

from llmos_jax import resolve
from llmos_jax.interchange import OpenedModel
from llmos_jax.models import Params
from llmos_jax.serving import Forward, open_forward

CHUNK, FIRST = 512, 256
"""Tokens of a chunk, and the first whose prediction counts."""
THREADS = 2

Logits = Callable[[np.ndarray], Any]
"""[512] ids -> float32 [255, V]: predictions of tokens 257 to 511."""


@dataclass(frozen=True, slots=True)
class Sums:
    """What is known of a contender, a number for every scored token."""

    nats: list[np.ndarray] = field(default_factory=list)
    divergence: list[np.ndarray] = field(default_factory=list)
    is_same: list[np.ndarray] = field(default_factory=list)

    def add(self, found: tuple[jax.Array, jax.Array, jax.Array]) -> None:
        """What `compared` says of a chunk."""
        for kept, some in zip((self.nats, self.divergence, self.is_same), found):
            kept.append(np.asarray(some))

    def row(self, exact: Sums) -> dict[str, float]:
        """The figures of the table."""
        nats, divergence = np.concatenate(self.nats), np.concatenate(self.divergence)
        more = nats.mean() - np.concatenate(exact.nats).mean()
        return {
            "perplexity": math.exp(nats.mean()),
            "perplexity_change_percent": 100 * math.expm1(more),
            "mean_kld": float(divergence.mean()),
            "kld_error": float(divergence.std() / math.sqrt(len(divergence))),
            "same_top_1_percent": 100 * float(np.concatenate(self.is_same).mean()),
            "tokens": len(nats),
        }


def main() -> None:
    """Score all contenders chunk by chunk; print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--models", nargs="*", default=[], metavar="DIR")
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    path = pathlib.Path(asked.model)
    if asked.model in ("smollm2", "gemma3"):
        path = few_bits.model_file(asked.model)
    source = resolve.open_model(str(path))
    chunks = list(chunks_of(source, asked.text, asked.chunks))
    with tempfile.TemporaryDirectory() as folder:
        exact = ours(source, source.params(dtype="float32"), "float32")
        contenders = few_bit_contenders(source) | checkpoints(source, asked.models)
        contenders |= llama_contenders(path, pathlib.Path(folder))
        rows = scored(exact, contenders, chunks)
    result = {"model": source.skeleton.spec.name, "text": asked.text.name, "rows": rows}
    print(json.dumps(result) if asked.json else table(result))


def chunks_of(
    source: OpenedModel, text: pathlib.Path, count: int
) -> Iterator[np.ndarray]:
    """The first chunks of a text, int32 [512] each."""
    tokenizer = source.tokenizer
    ids = np.asarray(tokenizer.encode(text.read_text(encoding="utf-8")), np.int32)
    for start in range(0, min(count * CHUNK, len(ids) - CHUNK + 1), CHUNK):
        chunk = ids[start : start + CHUNK].copy()
        if tokenizer.marks.adds_bos:
            chunk[0] = tokenizer.begin_id
        yield chunk


def ours(source: OpenedModel, params: Params, cache: str) -> Logits:
    """A model as serving runs it."""
    return runs(
        *open_forward(source.skeleton, params, compute_dtype="float32", kv_dtype=cache)
    )


def runs(model: Forward, params: Params) -> Logits:
    """The predictions of serving's forward pass, with a fresh cache."""

    @jax.jit
    def logits(params: Params, tokens_T: jax.Array) -> jax.Array:
        position_1T = jnp.arange(CHUNK, dtype=jnp.int32)[None]
        cache = model.empty_cache(1, CHUNK)
        x_1TD, _ = model.forward(params, tokens_T[None], position_1T, None, cache)
        return model.logits(params, x_1TD[:, FIRST:-1])[0]

    return lambda tokens_T: logits(params, tokens_T)


def few_bit_contenders(source: OpenedModel) -> dict[str, Logits]:
    """The modes of few_bits, rounded to nearest."""
    made = {
        mode.weights: few_bits.quantized(source, mode.weights)
        for mode in few_bits.MODES.values()
    }
    return {
        f"ours {name}": runs(*few_bits.opened(made[mode.weights], mode))
        for name, mode in few_bits.MODES.items()
    }


def checkpoints(source: OpenedModel, names: list[str]) -> dict[str, Logits]:
    """Models by name, in the dtype that they are computed with."""
    found = {}
    for name in names:
        model = resolve.open_model(name)
        assert model.skeleton.spec.vocab_size == source.skeleton.spec.vocab_size, name
        params = resolve.read_to_compute(model, "float32")
        found[pathlib.Path(name).name] = ours(model, params, "float32")
    return found


def llama_contenders(path: pathlib.Path, folder: pathlib.Path) -> dict[str, Logits]:
    """llama.cpp with our weights: as they are, and in its own few bits."""
    files = few_bits.llama_files(path, folder, ("Q8_0", "Q4_0"))
    if not files:
        return {}
    worker = few_bits.llama_worker(files, THREADS)
    return {f"llama.cpp {kind}": told(worker, kind, folder) for kind in files}


def told(worker: Worker, kind: str, folder: pathlib.Path) -> Logits:
    """What llama.cpp writes into a file."""
    out = folder / "logits.npy"

    def logits(tokens_T: np.ndarray) -> np.ndarray:
        tokens = tokens_T.tolist()
        worker.ask("logits", name=kind, tokens=tokens, first=FIRST, out=str(out))
        return np.load(out)[:-1]

    return logits


def scored(
    exact: Logits, contenders: dict[str, Logits], chunks: list[np.ndarray]
) -> dict[str, dict[str, float]]:
    """The figures of all, the float model's first."""
    label = "ours float32"
    sums = {name: Sums() for name in (label, *contenders)}
    for done, chunk in enumerate(chunks):
        targets = chunk[FIRST + 1 :]
        right = jax.block_until_ready(exact(chunk))
        sums[label].add(compared(right, right, targets))
        for name, logits in contenders.items():
            sums[name].add(compared(right, logits(chunk), targets))
        note(f"chunk {done + 1} of {len(chunks)}")
    return {name: found.row(sums[label]) for name, found in sums.items()}


@jax.jit
def compared(
    right_TV: jax.Array, other_TV: jax.Array, target_T: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nats of each token, its divergence, and whether the most likely is the same.

    Token by token: a vocabulary of 262,144 makes large arrays.
    """

    def of_one(row: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        right_V, other_V = jax.nn.log_softmax(row[0]), jax.nn.log_softmax(row[1])
        return (
            -other_V[row[2]],
            jnp.sum(jnp.exp(right_V) * (right_V - other_V)),
            jnp.argmax(right_V) == jnp.argmax(other_V),
        )

    found: tuple[jax.Array, jax.Array, jax.Array] = jax.lax.map(
        of_one, (right_TV, other_TV, target_T)
    )
    return found


def table(result: dict[str, Any]) -> str:
    """A line for each model."""
    lines = [
        f"{result['model']:<36}perplexity  change     mean KLD          same top 1"
    ]
    lines += [
        f"{name:<36}{row['perplexity']:10.4f}"
        f"{row['perplexity_change_percent']:+8.3f} %"
        f"{row['mean_kld']:10.5f} +- {row['kld_error']:.5f}"
        f"{row['same_top_1_percent']:10.2f} %"
        for name, row in result["rows"].items()
    ]
    count = next(iter(result["rows"].values()))["tokens"]
    return "\n".join([*lines, f"{count} tokens of {result['text']}"])


if __name__ == "__main__":
    main()
