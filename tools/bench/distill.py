#!/usr/bin/env python3
"""Whether a teacher helps a smaller model, and what training for int4 gives back.

    .venv/bin/python tools/bench/distill.py --student DIR --text FILE --score FILE
        [--teacher DIR] [--only distill|qat] [--steps N] [--work DIR] [--json]

distill: runs of the same shape over the same batches: a pruned student taught by the
model that it was cut from, as that is and after it was trained on the text itself
(--teacher-steps; "teacher correction", arXiv 2408.11796), the same student fine-tuned
on the text alone, and the shape from random weights. What is compared is perplexity on
another text of the kind.

qat: the model, in float and rounded to int4 by 32 (to nearest, largest weight largest
number, tables in int8); after training with [qat], rounded; and, since training on text
of the same kind helps by itself, the same training without [qat], in float and rounded.
`recovered` is the share of what int4 lost that QAT gives back, `recovered_beside` the
same against the fine-tuned model in float.

Every run is a `llmos train`, every int4 model a `llmos compress`: their folders stay in
--work, and a bench that was stopped goes on there. --text is learnt, the first
--score-bytes of --score are scored: WikiText-2's validation and test text, for example.
Students come from `llmos compress MODEL --out DIR --set compress.kind=prune`.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

HERE = pathlib.Path(__file__).resolve().parents[2]
SMOLLM2 = pathlib.Path("~/.cache/llmos-models/smollm2/hf").expanduser()

B = 8
LEARNING_RATES = {"student": 3e-4, "random": 1e-3, "qat": 5e-5}
"""Judgements, not searched for: usual for such models; random weights need more."""
GROUP = 32


def llmos(verb: str, *words: str) -> dict[str, Any]:
    """Run a verb in a process of its own; what it prints."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", f"llmos_jax.{verb}", *words, "--json"],
        cwd=HERE,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{verb} {' '.join(words)}\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    note(f"{verb} {words[0]}: {time.perf_counter() - began:.0f} s")
    return found


def note(line: str) -> None:
    """Say something beside the result."""
    print(line, file=sys.stderr, flush=True)


def sets(values: dict[str, Any]) -> list[str]:
    """`--set` words."""
    return [word for key, x in values.items() for word in ("--set", f"{key}={x}")]


class Bench:
    """What all runs share."""

    def __init__(self, asked: argparse.Namespace):
        self.asked = asked
        self.work = pathlib.Path(asked.work)
        self.work.mkdir(parents=True, exist_ok=True)
        self.score = self.work / "score.txt"
        text = pathlib.Path(asked.score).read_bytes()[: asked.score_bytes]
        self.score.write_bytes(text.rpartition(b"\n")[0] + b"\n")
        self.config = self.work / "run.toml"
        self.config.write_text(f'model = "{asked.teacher}"\n')

    def shared(self) -> dict[str, Any]:
        """Keys of training and of scoring."""
        return {
            "batch.seq_len": self.asked.seq_len,
            "batch.global": B,
            "train.compute_dtype": "float32",
            "data.test": self.score,
        }

    def run(self, name: str, model: str, rate: float, **more: Any) -> dict[str, Any]:
        """One training run; its report."""
        values = self.shared() | {
            "model": model,
            "run.dir": self.work / name,
            "data.train": self.asked.text,
            "data.validation": self.score,
            "train.steps": self.asked.steps,
            "train.warmup_steps": max(1, self.asked.steps // 10),
            "train.learning_rate": rate,
            "checkpoint.every": 1_000_000,
            "checkpoint.keep": 1,
            **{key.replace("__", "."): value for key, value in more.items()},
        }
        return llmos("train", str(self.config), *sets(values))

    def few_bits(self, name: str, model: str, **more: Any) -> dict[str, Any]:
        """An int4 model and its report."""
        out = self.work / name
        if (out / "report.json").is_file():
            return dict(json.loads((out / "report.json").read_bytes()))
        values = self.shared() | {
            key.replace("__", "."): value for key, value in more.items()
        }
        return llmos("compress", model, "--out", str(out), *sets(values))

    def evaluate(self, model: str) -> float:
        """Perplexity of a model on the scored text."""
        found = llmos("evaluate", model, *sets(self.shared()))
        return float(found["perplexity"])


def distill(bench: Bench) -> dict[str, Any]:
    """Perplexity of the three, and of student and teacher before."""
    asked, rates = bench.asked, LEARNING_RATES
    corrected = bench.run(
        *("corrected", asked.teacher, rates["qat"]), train__steps=asked.teacher_steps
    )
    taught, by_corrected = (
        bench.run(
            *(name, asked.student, rates["student"]),
            distill__teacher=teacher,
            distill__weight=asked.weight,
        )
        for name, teacher in (
            ("distilled", asked.teacher),
            ("distilled_corrected", bench.work / "corrected"),
        )
    )
    alone = bench.run("fine_tuned", asked.student, rates["student"])
    random = bench.run(
        *("random", asked.student, rates["random"]),
        train__from_scratch="true",
        data__tokenizer=asked.tokenizer or asked.teacher,
    )
    return {
        "params": taught["params"],
        "tokens": taught["tokens_seen"],
        "teacher": bench.evaluate(asked.teacher),
        "student_before": bench.evaluate(asked.student),
        "teacher_corrected": corrected["val_perplexity"],
        "distilled": taught["val_perplexity"],
        "distilled_corrected": by_corrected["val_perplexity"],
        "fine_tuned": alone["val_perplexity"],
        "random": random["val_perplexity"],
        "tokens_per_s": {
            name: round(one["tokens_per_s"])
            for name, one in (
                ("distilled", by_corrected),
                ("fine_tuned", alone),
            )
        },
        "distilled_is_best": by_corrected["val_perplexity"]
        < min(alone["val_perplexity"], random["val_perplexity"]),
    }


def qat(bench: Bench) -> dict[str, Any]:
    """Perplexity in float and in int4, before and after both ways to train."""
    asked, rate = bench.asked, LEARNING_RATES["qat"]
    nearest = {
        "compress__weights": "int4",
        "compress__group": GROUP,
        "compress__method": "nearest",
        "compress__clip": "false",
    }
    before = bench.few_bits("int4", asked.teacher, **nearest)
    trained = bench.run(
        "qat", asked.teacher, rate, qat__weights="int4", qat__group=GROUP
    )
    after = bench.few_bits("qat_int4", str(bench.work / "qat"))
    beside = bench.run("beside", asked.teacher, rate)
    beside_int4 = bench.few_bits("beside_int4", str(bench.work / "beside"), **nearest)
    lost = before["perplexity"] - before["perplexity_before"]
    lost_beside = beside_int4["perplexity"] - beside_int4["perplexity_before"]
    return {
        "tokens": trained["tokens_seen"],
        "float": before["perplexity_before"],
        "int4": before["perplexity"],
        "qat_int4": after["perplexity"],
        "qat_as_trained": trained["val_perplexity"],
        "fine_tuned": beside["val_perplexity"],
        "fine_tuned_int4": beside_int4["perplexity"],
        "recovered": (before["perplexity"] - after["perplexity"]) / lost,
        "recovered_beside": (beside_int4["perplexity"] - after["perplexity"])
        / lost_beside,
        "tokens_per_s": round(trained["tokens_per_s"]),
    }


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", default=str(SMOLLM2))
    parser.add_argument("--student", help="a pruned checkpoint of the teacher")
    parser.add_argument("--text", required=True, help="to learn from")
    parser.add_argument("--score", required=True, help="to score on")
    parser.add_argument("--score-bytes", type=int, default=60_000)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--teacher-steps", type=int, default=30)
    parser.add_argument("--weight", type=float, default=0.8, help="of the teacher")
    parser.add_argument("--tokenizer", help="data.tokenizer; default: the teacher's")
    parser.add_argument("--only", choices=["distill", "qat"])
    parser.add_argument("--work", default="/tmp/llmos-distill", help="a folder")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    if asked.only != "qat" and asked.student is None:
        parser.error("--student names the pruned model (or --only qat)")
    bench = Bench(asked)
    found: dict[str, Any] = {"steps": asked.steps, "batch": [B, asked.seq_len]}
    for name, part in (("distill", distill), ("qat", qat)):
        if asked.only in (None, name):
            found[name] = part(bench)
    if asked.json:
        print(json.dumps(found))
        return
    for name in ("distill", "qat"):
        for key, value in found.get(name, {}).items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{name:8} {key:20} {shown}")


if __name__ == "__main__":
    main()
