#!/usr/bin/env python3
"""What pruning costs and what it brings, of SmolLM2-135M.

    .venv/bin/python tools/bench/prune.py --calibration FILE --test FILE
        [--only masks|structured|speed] [--pruned DIR] [--batches 5] [--rounds 5]
        [--threads 2] [--json]

masks        perplexity with half of the weights zero: Wanda's choice and the largest
structured   perplexity at 2/3 of the parameters, before any training
speed        decode of the smaller model in int8 over the whole one in int8, one
             sequence, beside the ratio of the two plans. One process each, taking turns
             on the same cores; medians over blocks of 32 greedy steps (decode.py)

Perplexity is over `--batches` batches of 8 x 512 tokens of --test, spread over it;
--calibration is what importance is measured on. --pruned: a checkpoint to take the
speed of, in place of one that is made here (then no text is needed for `speed`).
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
from dataclasses import replace
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import decode
import few_bits
from workers import Worker, note

from llmos_jax import driver, resolve

PARTS = ("masks", "structured", "speed")
KEPT = 0.67
"""Share of the parameters of the structured one."""
CONTEXT = decode.PROMPT + 1 + decode.BLOCKS * decode.STEPS
"""Tokens of a measured sequence at its end."""


def main() -> None:
    """Measure the parts, then print lines or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a float model; default: tools/get-model's")
    parser.add_argument("--calibration", help="a text")
    parser.add_argument("--test", help="another text")
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--pruned", help="a smaller checkpoint of the model")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    parts = [asked.only] if asked.only else list(PARTS)
    makes = parts != ["speed"] or asked.pruned is None
    if makes and not (asked.calibration and asked.test):
        sys.exit("error: name two texts: --calibration FILE --test FILE.")
    model = asked.model or str(few_bits.model_file("smollm2"))
    found: dict[str, Any] = {"cpu": decode.cpu_name(), "threads": asked.threads}
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        if "masks" in parts:
            found["masks"] = masks(model, place, asked)
        if "structured" in parts or asked.pruned is None and "speed" in parts:
            asked.pruned = str(place / "structured")
            found["structured"] = structured(model, asked.pruned, asked)
        if "speed" in parts:
            decode.pin(asked.threads)
            found["speed"] = speed(model, asked.pruned, asked.rounds)
    print(json.dumps(found) if asked.json else table(found))


def made(model: str, out: str, asked: argparse.Namespace, *sets: str) -> dict[str, Any]:
    """The report of one pruning."""
    return driver.compress(
        model,
        [
            "compress.kind=prune",
            f"compress.out={out}",
            f"compress.calibration={asked.calibration}",
            f"data.test={asked.test}",
            f"compress.evaluate_batches={asked.batches}",
            "batch.seq_len=512",
            "batch.global=8",
            "serve.seats=1",
            f"serve.context={CONTEXT}",
            *sets,
        ],
    )


def masks(model: str, place: pathlib.Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Perplexities with half of the weights zero."""
    found: dict[str, Any] = {}
    for method in ("magnitude", "wanda"):
        report = made(model, str(place / method), asked, f"prune.method={method}")
        found |= {
            "dense": report["perplexity_before"],
            method: report["perplexity"],
            "tokens": report["evaluated_tokens"],
        }
        note(f"{method}: perplexity {report['perplexity']:.2f}")
    return found | {"wanda_over_magnitude": found["wanda"] / found["magnitude"]}


def structured(model: str, out: str, asked: argparse.Namespace) -> dict[str, Any]:
    """What a model of 2/3 of the parameters is like before it is trained."""
    report = made(model, out, asked, f"prune.keep={KEPT}")
    wanted = "model params params_before shape perplexity perplexity_before".split()
    tried = [one for one in report["candidates"] if one["loss"] is not None]
    return {name: report[name] for name in wanted} | {"tried": tried}


def speed(model: str, pruned: str, rounds: int) -> dict[str, Any]:
    """Decode of both in int8, measured and planned."""
    contenders, sizes = {}, {}
    for label, path in (("dense", model), ("pruned", pruned)):
        worker = Worker(sys.executable, str(decode.HERE / "decode_ours.py"))
        sizes[label] = worker.ask("load", path=path, names=["int8"])["int8"]
        contenders[label] = decode.Contender(label=label, worker=worker, name="int8")
    seconds: dict[str, list[float]] = {label: [] for label in contenders}
    for number in range(rounds + 1):  # the first one compiles
        for label, contender in contenders.items():
            one = contender.measure("1", decode.BLOCKS, decode.STEPS)
            if number:
                seconds[label] += one
                note(f"round {number}  {label:<8}{1 / statistics.median(one):8.1f}/s")
    for contender in contenders.values():
        contender.worker.close()
    took = {label: statistics.median(one) for label, one in seconds.items()}
    planned = {"dense": predicted_s(model), "pruned": predicted_s(pruned)}
    ratio, expected = (one["dense"] / one["pruned"] for one in (took, planned))
    return {
        "tokens_per_s": {label: 1 / one for label, one in took.items()},
        "predicted_tokens_per_s": {label: 1 / one for label, one in planned.items()},
        "weights_bytes": sizes,
        "ratio": ratio,
        "predicted_ratio": expected,
        "measured_over_predicted": ratio / expected,
    }


def predicted_s(model: str) -> float:
    """What the planner says of a decode step like those that are measured."""
    _, config = resolve.open_with_config(model, [])
    serve = replace(
        config.serve,
        weight_dtype="int8",
        kv_dtype="float32",
        seats=1,
        context=CONTEXT,
    )
    return driver.plan(resolve.to_serve(replace(config, serve=serve))).predicted.step_s


def table(found: dict[str, Any]) -> str:
    """Every figure in a line."""
    lines = []
    for part, figures in found.items():
        if not isinstance(figures, dict):
            lines.append(f"{part:<12}{figures}")
            continue
        for name, value in figures.items():
            if name != "tried":
                lines.append(f"{part:<12}{name:<26}{value}")
        for one in figures.get("tried", ()):
            lines.append(f"{part:<12}tried {json.dumps(one)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
