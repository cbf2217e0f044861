#!/usr/bin/env python3
"""Storage as ratios on this machine: checkpoints against safetensors, tokenizing
against datasets.map, and what saving and reading take from training.

    .venv/bin/python tools/bench/storage.py [--json] [--only checkpoint,train,tokenize]

`checkpoint`: a state of 1 GB (weights and two moments) is saved and restored by our
store, and the same bytes written and read by `safetensors`, taking turns; medians.
`train`: the 29M model of configs/models/bench_29m.toml, 8 x 256 tokens a step, saves
every few steps; what a save holds up, and what waiting for data takes.
`tokenize`: the corpus room's two processes against `datasets.map(num_proc=2)` with the
same tokenizer over the same documents; `datasets` is of `pip install datasets`.
`--bundle DIR --only ''`: from `serve DIR` to /ready.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = 5
LAYERS, D, F = 12, 768, 2304
"""85 million float32 weights; with two moments each, 1.02 GB."""


def _seconds(function: Callable[[], object]) -> float:
    os.sync()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def checkpoint(folder: Path) -> dict[str, float]:
    """Save and restore 1 GB, ours and by safetensors."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import load_file, save_file

    from llmos_jax.checkpoint import CheckpointStore, Manifest, Retention
    from llmos_jax.config import load_model
    from llmos_jax.data import bytes_tokenizer

    shapes = {f"layers.{n}": (LAYERS, D, F) for n in ("gate", "up", "down")}
    shapes |= {f"layers.{n}": (LAYERS, D, D) for n in "qkvo"}

    def drawn(seed: int) -> dict[str, jax.Array]:
        keys = jax.random.split(jax.random.key(seed), len(shapes))
        return {
            name: jax.random.normal(key, shape)
            for key, (name, shape) in zip(keys, shapes.items())
        }

    params, optimizer = drawn(0), {"mu": drawn(1), "nu": drawn(2)}
    flat = {f"{i}/{name}": np.asarray(x)
            for i, part in enumerate((params, *optimizer.values()))
            for name, x in part.items()}  # fmt: skip
    nbytes = sum(x.nbytes for x in flat.values())
    tokenizer = bytes_tokenizer().to_json()
    model = load_model("bench_29m")
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        {"params": params, "optimizer": optimizer},
    )
    times: dict[str, list[float]] = {
        name: [] for name in ("save", "blocked", "restore", "st_write", "st_read")
    }
    store = CheckpointStore(folder / "checkpoints", retention=Retention(keep=1))
    file = folder / "plain.safetensors"
    for step in range(ROUNDS):
        manifest = Manifest(
            step=step, model=model, plan_fingerprint="", mesh={}, data={}
        )
        blocked: list[float] = []

        def save(manifest: Manifest = manifest, blocked: list[float] = blocked) -> None:
            start = time.perf_counter()
            store.save(manifest, params, optimizer, tokenizer)
            blocked.append(time.perf_counter() - start)
            store.wait()

        times["save"].append(_seconds(save))
        times["blocked"] += blocked
        times["st_write"].append(_seconds(lambda: save_file(flat, str(file))))
        times["restore"].append(
            _seconds(lambda s=step: jax.block_until_ready(store.restore(s, **like)))
        )
        times["st_read"].append(
            _seconds(lambda: {k: jnp.asarray(v) for k, v in load_file(file).items()})
        )
        print(f"round {step + 1} of {ROUNDS}", file=sys.stderr)
    store.close()
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "bytes": nbytes,
        "save_bytes_per_s": nbytes / medians["save"],
        "restore_bytes_per_s": nbytes / medians["restore"],
        "save_blocks_s": medians["blocked"],
        "save_against_safetensors": medians["st_write"] / medians["save"],
        "restore_against_safetensors": medians["st_read"] / medians["restore"],
    }


EVERY, STEPS = 8, 41


def train(folder: Path) -> dict[str, float]:
    """Train 41 steps and save after every eighth; read what that took."""
    from llmos_jax import driver
    from llmos_jax.checkpoint import CheckpointStore
    from llmos_jax.config import load_config

    held_s, save = [], CheckpointStore.save

    def timed(store: CheckpointStore, *saved: Any) -> None:
        start = time.perf_counter()
        save(store, *saved)
        held_s.append(time.perf_counter() - start)

    CheckpointStore.save = timed  # type: ignore[method-assign]
    sets = {
        "model": "bench_29m", "topology": "cpu:1", "run.dir": folder / "run",
        "train.compute_dtype": "float32", "train.steps": STEPS, "batch.global": 8,
        "batch.seq_len": 256, "checkpoint.every": EVERY, "train.eval_batches": 4,
        "generate.prompts": "[]",
    }  # fmt: skip
    texts = [f"{key}={value}" for key, value in sets.items()]
    report = driver.train(load_config("quickstart", texts).config)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    steps = {row["step"]: row["step_s"] for row in map(json.loads, lines)}
    # A save after step n is sent before step n + 1, whose time holds it.
    after = [s for n, s in steps.items() if n > EVERY and n % EVERY == 1]
    plain = [s for n, s in steps.items() if n > 2 and n % EVERY not in (1, 2)]
    step_s = statistics.median(plain)
    spent = report["goodput_s"]
    return {
        "step_s": step_s,
        "step_with_save_over_step": statistics.median(after) / step_s,
        "save_holds_the_loop_over_step": statistics.median(held_s[1:]) / step_s,
        "waiting_for_data_over_stepping": spent["data_stall"] / spent["stepping"],
        "goodput": report["goodput"],
    }


def tokenize(folder: Path) -> dict[str, float]:
    """Encode Python's documentation, ours and datasets.map, with two processes each."""
    os.environ["HF_DATASETS_CACHE"] = str(folder / "hf")
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    try:
        import datasets
    except ImportError:
        sys.exit("error: `tokenize` compares with datasets: pip install datasets")
    import tokenizers

    from llmos_jax.corpus import encode_texts
    from llmos_jax.data import read_documents, train_bpe

    texts = [one.text for one in read_documents(["python-docs"], text_key="text")]
    ours = train_bpe(texts, 8192)
    own = json.loads(ours.to_json())
    kept = ("version", "truncation", "padding", "added_tokens", "normalizer",
            "pre_tokenizer", "post_processor", "decoder", "model")  # fmt: skip
    plain = tokenizers.Tokenizer.from_str(json.dumps({key: own[key] for key in kept}))
    rows = datasets.Dataset.from_dict({"text": texts})

    def theirs(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        found = plain.encode_batch_fast(batch["text"], add_special_tokens=False)
        return {"input_ids": [one.ids for one in found]}

    def mapped() -> None:
        rows.map(
            *(theirs,), batched=True, num_proc=2, batch_size=64,
            remove_columns=["text"], load_from_cache_file=False,
        )  # fmt: skip

    times: dict[str, list[float]] = {"ours": [], "map": []}
    tokens = 0
    for number in range(ROUNDS):
        out = folder / f"corpus{number}"
        start = time.perf_counter()
        tokens = encode_texts(texts, ours, out, workers=2).num_tokens
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        mapped()
        times["map"].append(time.perf_counter() - start)
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens_per_s": tokens / medians["ours"],
        "against_datasets_map": medians["map"] / medians["ours"],
    }


def ready(bundle: str) -> dict[str, float]:
    """Seconds from `serve BUNDLE` until it takes requests; the first start warms up."""
    seconds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        command = [sys.executable, "-m", "llmos_jax.serve", bundle, "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        line = next((one for one in lines if one.startswith("serving ")), None)
        if line is None:
            sys.exit(f"error: {bundle} cannot be served; see: {' '.join(command)}")
        while not _is_ready(line.rsplit(" at ", 1)[1].strip()):
            time.sleep(0.02)
        seconds.append(time.perf_counter() - start)
        process.terminate()
        process.communicate()
    return {"ready_s": statistics.median(seconds[1:]), "worst_s": max(seconds[1:])}


def _is_ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/ready", timeout=10):
            return True
    except OSError:
        return False


PARTS: dict[str, Callable[[Path], dict[str, float]]] = {
    "checkpoint": checkpoint,
    "train": train,
    "tokenize": tokenize,
}


def main() -> None:
    """Run the parts that are asked for, and print what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--bundle", help="a Bundle: how soon is it served?")
    arguments = parser.parse_args()
    found = {}
    if arguments.bundle is not None:
        found["ready"] = ready(arguments.bundle)
    for name in filter(None, arguments.only.split(",")):
        folder = Path(tempfile.mkdtemp(prefix="llmos-storage-"))
        try:
            found[name] = PARTS[name](folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    if arguments.json:
        print(json.dumps(found))
        return
    for name, figures in found.items():
        for what, value in figures.items():
            print(f"{name:12}{what:34}{value:,.4g}")


if __name__ == "__main__":
    main()
