#!/usr/bin/env python3
"""Training throughput of the 29M bench model against PyTorch eager and MaxText, here.

    .venv/bin/python tools/bench/train.py [--json] [--rounds 3]

One process at a time, taking turns, on the same cores; medians over all timed steps.
Every contender trains bench_29m on random tokens: batch 8 x 256, float32, AdamW,
clipped at 1.0.

The peers live in environments of their own: LLMOS_PEERS_PYTHON names the Python of one
with torch 2.13 and transformers, LLMOS_MAXTEXT_PYTHON one with maxtext 0.2.5. A peer
that is missing is left out, with a line that says how to get it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time

BATCH, SEQ_LEN, WARM, TIMED = 8, 256, 3, 6
HOW = {
    "torch": "python3 -m venv P && P/bin/pip install torch==2.13.0 transformers; "
    "export LLMOS_PEERS_PYTHON=P/bin/python",
    "maxtext": "python3.12 -m venv M && M/bin/pip install uv && M/bin/python -m uv pip "
    "install --python M/bin/python 'maxtext[tpu]==0.2.5'; "
    "export LLMOS_MAXTEXT_PYTHON=M/bin/python",
}
MAXTEXT = (
    "run_name=bench hardware=cpu decoder_block=llama2 base_emb_dim=512 "
    "base_num_decoder_layers=8 base_num_query_heads=8 base_num_kv_heads=4 head_dim=64 "
    "base_mlp_dim=1536 vocab_size=8192 logits_via_embedding=true "
    f"max_target_length={SEQ_LEN} per_device_batch_size={BATCH} dataset_type=synthetic "
    "enable_checkpointing=false dtype=float32 weight_dtype=float32 remat_policy=none "
    "attention=dot_product gradient_clipping_threshold=1.0 monitor_goodput=false "
    "enable_goodput_recording=false skip_jax_distributed_system=true"
)


def ours() -> dict[str, object]:
    """The product's own training program, as `train` lowers it."""
    import jax
    import numpy as np

    from llmos_jax import driver, lowering, models, planner, resolve, training
    from llmos_jax.config import load_config

    sets = ["model=bench_29m", "topology=cpu:1", "train.compute_dtype=float32"]
    sets += [f"batch.global={BATCH}", f"batch.seq_len={SEQ_LEN}"]
    config = load_config(None, sets).config
    plan = driver.plan(config)
    skeleton = models.skeleton(resolve.spec_of(config))
    session = training.open_session(skeleton, plan, config)
    tokens = np.random.default_rng(0).integers(0, 8192, (BATCH, SEQ_LEN + 1), np.int32)
    batch = {"inputs": tokens[:, :-1].copy(), "targets": tokens[:, 1:].copy()}
    [batch] = list(session.batches(iter([batch])))  # type: ignore[arg-type]
    state = session.fresh()
    session.program.compile()
    seconds = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        state, metrics = session.program(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    flops = planner.model_flops(planner.sizes_of(plan.params), plan.workload)
    rate = lowering.measure_matmul_flops_per_s(2048)
    return {
        "seconds": seconds[WARM:],
        "matmul_flops_per_s": rate,
        "model_flops": flops,
        "remat": plan.remat,
    }


def torch() -> dict[str, object]:
    """LlamaForCausalLM, eager, fused AdamW."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, intermediate_size=1536, vocab_size=8192,
            tie_word_embeddings=True, max_position_embeddings=2048, use_cache=False,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    tokens = torch.randint(0, 8192, (BATCH, SEQ_LEN))
    seconds = []
    for _ in range(WARM + TIMED):
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds[WARM:]}


def maxtext(python: str) -> dict[str, object]:
    """Its own trainer on synthetic data; step times from its log."""
    where = "import importlib.util as u; print(u.find_spec('maxtext').origin)"
    package = pathlib.Path(_output([python, "-c", where]).strip().splitlines()[-1])
    base = package.parent / "configs" / "base.yml"
    with tempfile.TemporaryDirectory() as folder:
        log = _output(
            [python, "-m", "maxtext.trainers.pre_train.train", str(base)]
            + MAXTEXT.split()
            + ['mlp_activations=["silu","linear"]', f"steps={WARM + TIMED}"]
            + [f"base_output_directory={folder}"],
            {**os.environ, "JAX_PLATFORMS": "cpu"},
        )
    found = re.findall(r"completed step: \d+, seconds: ([\d.]+)", log)
    return {"seconds": [float(text) for text in found][WARM:]}


def _output(command: list[str], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=900
    )
    if done.returncode:
        sys.exit(f"error: {command[0]} failed:\n{(done.stdout + done.stderr)[-2000:]}")
    return done.stdout + done.stderr


def _contenders() -> dict[str, str]:
    """Name -> the Python that runs it."""
    found = {"ours": sys.executable}
    peers = os.environ.get("LLMOS_PEERS_PYTHON")
    if peers or importlib.util.find_spec("transformers"):
        found["torch"] = peers or sys.executable
    beside = pathlib.Path(peers or ".").parents[2:3]
    python = os.environ.get("LLMOS_MAXTEXT_PYTHON") or next(
        (str(p / "maxtext/bin/python") for p in beside
         if (p / "maxtext/bin/python").exists()), None
    )  # fmt: skip
    if python:
        found["maxtext"] = python
    for name in HOW.keys() - found.keys():
        print(f"{name} is left out. To have it: {HOW[name]}", file=sys.stderr)
    return found


def main() -> None:
    """Take turns, then print one table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", choices=["ours", "torch"])
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps({"ours": ours, "torch": torch}[arguments.worker]()))
        return
    contenders = _contenders()
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for number in range(arguments.rounds):
        for name, python in contenders.items():
            runs[name].append(_turn(name, python))
            rate = _tokens_per_s(runs[name][-1:])
            note = f"round {number + 1}  {name:<8} {rate:7.0f} tokens/s"
            print(note, file=sys.stderr, flush=True)
    result = _result(runs)
    print(json.dumps(result) if arguments.json else _table(result))


def _tokens_per_s(turns: list[dict]) -> float:
    times = [second for turn in turns for second in turn["seconds"]]
    return BATCH * SEQ_LEN / statistics.median(times)


def _result(runs: dict[str, list[dict]]) -> dict[str, float]:
    result = {
        f"{name}_tokens_per_s": _tokens_per_s(turns) for name, turns in runs.items()
    }
    mine = result["ours_tokens_per_s"]
    for peer in runs.keys() - {"ours"}:
        result[f"ratio_to_{peer}"] = mine / result[f"{peer}_tokens_per_s"]
    rate = statistics.median(turn["matmul_flops_per_s"] for turn in runs["ours"])
    flops = runs["ours"][0]["model_flops"]
    result["matmul_gflops_per_s"] = rate / 1e9
    result["share_of_matmul_rate"] = flops * mine / (BATCH * SEQ_LEN) / rate
    return result


def _table(result: dict[str, float]) -> str:
    return "\n".join(f"{name:<24} {value:10.3f}" for name, value in result.items())


def _turn(name: str, python: str) -> dict:
    if name == "maxtext":
        return maxtext(python)
    command = [python, str(pathlib.Path(__file__).resolve()), "--worker", name]
    return json.loads(_output(command).strip().splitlines()[-1])


if __name__ == "__main__":
    main()
