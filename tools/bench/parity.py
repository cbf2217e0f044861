#!/usr/bin/env python3
"""Perplexity of real models here and in transformers, on the same windows of a text.

    tools/bench/parity.py --text FILE [smollm2] [gemma3] [--seq-len 1024] [--json]

Both compute in float32 on the CPU. The ids are ours for both, cut into windows that lie
end to end (for models that begin with a mark: each window does). Needs transformers
(pip install -e '.[peers]') and the models (tools/get-model NAME).
"""

import argparse
import json
import math
import os
import pathlib
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
NAMES = ("smollm2", "gemma3")


def ours(path: pathlib.Path, text: pathlib.Path, seq_len: int) -> dict:
    """What `evaluate` says."""
    from llmos_jax import driver

    sets = [f"data.test={text}", f"batch.seq_len={seq_len}", "batch.global=2"]
    return driver.evaluate(str(path), sets)


def theirs(path: pathlib.Path, text: pathlib.Path, seq_len: int) -> dict:
    """The same sum of losses by transformers."""
    import numpy as np
    import torch
    import transformers

    from llmos_jax.interchange import open_archive

    tokenizer = open_archive(path).tokenizer
    ids = tokenizer.encode(text.read_text(encoding="utf-8"))
    ids = np.concatenate([[tokenizer.begin_id], ids]).astype(np.int64)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    nats, starts = 0.0, range(0, len(ids) - 1, seq_len)
    for done, start in enumerate(starts):
        window = ids[start : start + seq_len + 1]
        inputs = window[:-1].copy()
        if tokenizer.marks.adds_bos:
            inputs[0] = tokenizer.begin_id
        with torch.no_grad():
            logits = model(torch.tensor(inputs[None])).logits[0]
            targets = torch.tensor(window[1:])
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        nats += float(loss)
        if done % 20 == 0:
            print(f"transformers: {done} of {len(starts)} windows", file=sys.stderr)
    return {"tokens": len(ids) - 1, "perplexity": math.exp(nats / (len(ids) - 1))}


def main() -> None:
    """Compare each model; print a row or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", choices=[[], *NAMES])
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = {}
    for name in asked.models or NAMES:
        path = pathlib.Path.home() / f".cache/llmos-models/{name}/model.gguf"
        row = {}
        for who, score in (("ours", ours), ("transformers", theirs)):
            began = time.perf_counter()
            found = score(path, asked.text, asked.seq_len)
            row[who] = found["perplexity"]
            row[f"{who}_s"] = time.perf_counter() - began
            row["tokens"] = found["tokens"]
        row["relative_difference"] = row["ours"] / row["transformers"] - 1
        rows[name] = row
        if not asked.json:
            print(
                f"{name}: {row['ours']:.5f} here, {row['transformers']:.5f} in "
                f"transformers ({row['relative_difference']:+.1e}), "
                f"{row['tokens']} tokens, {row['ours_s']:.0f} s and "
                f"{row['transformers_s']:.0f} s"
            )
    if asked.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
