"""A run small enough for a test: how to ask for it, and what it left behind."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llmos_jax import driver, models, training
from llmos_jax.checkpoint import find_checkpoint
from llmos_jax.config import RunConfig, load_config

HERE = Path(__file__).parent

MODEL = """
family = "llama"
num_layers = 2
embed_dim = 64
ffn_dim = 128
num_heads = 8
num_kv_heads = 4
head_dim = 16
vocab_size = 512
max_seq_len = 128
tied_embeddings = true
"""
"""`tiny` with room for the 257 tokens of `data.tokenizer = bytes`."""


def overrides(folder: Path, model: Path, text: Path, **more: Any) -> list[str]:
    """`--set` texts of a 20-step float32 run; `a__b=1` sets a.b."""
    values = {
        "model": model,
        "run.dir": folder,
        "batch.seq_len": 32,
        "batch.global": 8,
        "train.steps": 20,
        "train.compute_dtype": "float32",
        "train.learning_rate": 1e-3,
        "train.warmup_steps": 4,
        "checkpoint.every": 10,
        "data.train": text,
        "data.tokenizer": "bytes",
        "generate.prompts": "[]",
    }
    values |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"{key}={value}" for key, value in values.items()]


def flags(texts: list[str]) -> list[str]:
    """The same as command line arguments."""
    return [word for text in texts for word in ("--set", text)]


def config_of(texts: list[str]) -> RunConfig:
    """The same as a checked config, over quickstart's as `train` takes it."""
    return load_config("quickstart", texts).config


def train(texts: list[str]) -> dict[str, Any]:
    """Train here, on the eight devices of this process."""
    return driver.train(config_of(texts))


def losses(folder: Path) -> list[float]:
    """The loss of every step in metrics.jsonl, which must count 1, 2, 3, ..."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def arrays(folder: Path, step: int | None = None) -> dict[str, np.ndarray]:
    """Every array of a checkpoint (weights and moments), whole, by name."""
    store, latest = find_checkpoint(str(folder))
    step = latest if step is None else step
    manifest = store.manifest(step)
    skeleton = models.skeleton(manifest.model)
    optimizer = training.make_optimizer(
        load_config(None, ["model=tiny"]).config.train, skeleton.table
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        jax.eval_shape(functools.partial(training.init_state, skeleton, optimizer, 0)),
    )
    restored = store.restore(step, params=shape.params, optimizer=shape.optimizer)
    flat, _ = jax.tree_util.tree_flatten_with_path(restored)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Names of arrays that are not equal bit for bit."""
    assert a.keys() == b.keys() and len(a) > 20
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


def start(
    code: str | list[str], *, devices: int = 8, **environment: str
) -> subprocess.Popen[str]:
    """Start Python on code (`-c`), or on arguments, beside this process."""
    words = ["-c", code] if isinstance(code, str) else code
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=HERE.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"{HERE.parent}:{HERE}",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
