#!/usr/bin/env python3
"""Decode and prefill of SmolLM2-135M against llama.cpp and others, in tokens/s.

    .venv/bin/python tools/bench/decode.py [--json] [--rounds 5] [--threads 2]

Same weights for all: tools/get-model's, in int8 and int4 of ours, and in llama.cpp's
Q8_0 and Q4_0, which llama.cpp itself makes of our export. One process each, on the same
cores, taking turns at every figure; medians. A decode figure is over blocks of 32
greedy steps (for ours: one dispatch) after a prompt of 32 tokens, the first block of
each turn left out; a prefill figure is until the first token is known. How far each is
from the float model: tools/bench/quality.py.

The peers live in an environment of their own: LLMOS_PEERS_PYTHON names its Python. One
that is missing is left out, with a line that says how to get it.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

import few_bits
import numpy as np
from workers import Worker, note, peers_python

from llmos_jax import driver

BATCHES, PREFILLS = (1, 4, 8, 16, 32), (128, 512)
INT4_BATCHES = (1, 8)
OTHER_BATCHES = {"transformers": (1,), "ctranslate2": (1, 8, 32)}
"""Where the others are measured, for a round to take minutes."""
PROMPT, STEPS, BLOCKS = 32, 32, 3
GENERATED = 64
"""Tokens of the run whose memory is measured."""
OURS, OURS_INT4 = "ours int8", "ours int4 group 32"
THEIRS, THEIRS_INT4 = "llama.cpp Q8_0", "llama.cpp Q4_0"
HERE = pathlib.Path(__file__).parent

Times = dict[str, dict[str, list[float]]]
"""Contender -> case -> seconds a token, of every block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """What takes turns."""

    label: str
    worker: Worker
    name: str
    """What the worker knows it by."""
    batches: tuple[int, ...] = BATCHES

    def measure(self, case: str, blocks: int, steps: int) -> list[float]:
        """Seconds a token, of every block (or prompt) after the first."""
        random = np.random.default_rng(0)
        if case.startswith("prefill"):
            count = int(case.split()[1])
            prompt = random.integers(100, 40000, count).tolist()
            asked = {"prompt": prompt, "times": blocks}
            seconds = self.worker.ask("prefill", name=self.name, **asked)
        else:
            count = int(case) * steps
            prompts = random.integers(100, 40000, (int(case), PROMPT)).tolist()
            asked = {"prompts": prompts, "blocks": blocks, "steps": steps}
            seconds = self.worker.ask("decode", name=self.name, **asked)
        return [second / count for second in seconds[1:]]


def main() -> None:
    """Take turns, then print tables or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS, help="of a block, up to 32")
    parser.add_argument("--only", default="", help="cases whose name has this pattern")
    asked = parser.parse_args()
    pin(asked.threads)
    cases = [*map(str, BATCHES), *(f"prefill {count}" for count in PREFILLS)]
    cases = [case for case in cases if re.search(asked.only, case)]
    with tempfile.TemporaryDirectory() as folder:
        source = few_bits.model_file("smollm2")
        made = pathlib.Path(folder)
        mine, weight_bytes = our_contenders(source)
        contenders = mine + their_contenders(source, made, asked.threads)
        times, reads = take_turns(contenders, cases, asked, weight_bytes[OURS])
        for worker in {contender.worker for contender in contenders}:
            worker.close()
        memory = memory_of_a_run(source, made / "int8")
    result = {
        "threads": asked.threads,
        "rounds": asked.rounds,
        "cpu": cpu_name(),
        **rates(times),
        **ratios(times),
        **bandwidth(times, reads, weight_bytes[OURS]),
        "memory": memory,
    }
    print(json.dumps(result) if asked.json else table(result))


def pin(threads: int) -> None:
    """Keep this process, and those it will start, on so many CPUs: on a core each, as
    long as there are cores."""

    def first_of_core(cpu: int) -> int:
        path = f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        try:
            return int(re.split(r"\D", pathlib.Path(path).read_text())[0])
        except OSError:
            return cpu

    cpus = sorted(
        os.sched_getaffinity(0), key=lambda cpu: (cpu != first_of_core(cpu), cpu)
    )
    if len(cpus) < threads:
        sys.exit(f"error: {threads} threads want as many CPUs; there are {len(cpus)}.")
    os.sched_setaffinity(0, cpus[:threads])


def our_contenders(
    source: pathlib.Path,
) -> tuple[list[Contender], dict[str, int]]:
    """Our modes in one process, and the bytes of each one's weights."""
    worker = Worker(sys.executable, str(HERE / "decode_ours.py"))
    names = {
        OURS: "int8",
        "ours int8, int8 cache": "int8, int8 cache",
        "ours int8, int8 tokens": "int8, int8 tokens",
        OURS_INT4: "int4 group 32",
    }
    sizes = worker.ask("load", path=str(source), names=list(names.values()))
    contenders = [
        Contender(
            label=label,
            worker=worker,
            name=name,
            batches=INT4_BATCHES if label == OURS_INT4 else BATCHES,
        )
        for label, name in names.items()
    ]
    return contenders, {label: sizes[name] for label, name in names.items()}


def their_contenders(
    source: pathlib.Path, folder: pathlib.Path, threads: int
) -> list[Contender]:
    """The peers that are here."""
    found = []
    files = few_bits.llama_files(source, folder, ("Q8_0", "Q4_0"))
    if files:
        del files["F32"]
        worker = few_bits.llama_worker(files, threads)
        found += [
            Contender(
                label=f"llama.cpp {kind}",
                worker=worker,
                name=kind,
                batches=INT4_BATCHES if kind == "Q4_0" else BATCHES,
            )
            for kind in files
        ]
    wanted = {"transformers": ("torch",), "ctranslate2": ("ctranslate2",)}
    for name, needs in wanted.items():
        python = peers_python("transformers", *needs)
        if python is None:
            continue
        model = folder / "hf"
        if not model.exists():
            driver.convert(str(source), str(model), form="hf", dtype="float32")
        worker = Worker(python, str(HERE / "hf_worker.py"))
        worker.ask("load", name=name, folder=str(model), threads=threads)
        found.append(
            Contender(label=name, worker=worker, name=name, batches=OTHER_BATCHES[name])
        )
    return found


def take_turns(
    contenders: list[Contender],
    cases: list[str],
    asked: argparse.Namespace,
    num_bytes: int,
) -> tuple[Times, dict[str, list[float]]]:
    """All cases, round after round; and what reading memory takes in between."""
    times: Times = {contender.label: {} for contender in contenders}
    reads: dict[str, list[float]] = {"far": [], "near": []}
    far, near = (buffer(size, asked.threads) for size in (1 << 30, num_bytes))
    for number in range(asked.rounds + 1):  # the first one compiles
        for case in cases:
            for contender in contenders:
                if case.isdigit() and int(case) not in contender.batches:
                    continue
                if not number:
                    contender.measure(case, 1, 1)
                    continue
                found = contender.measure(case, BLOCKS, asked.steps)
                times[contender.label].setdefault(case, []).extend(found)
                rate = 1 / statistics.median(found)
                note(f"round {number}  {case:<12}{contender.label:<24}{rate:8.1f}/s")
        reads["far"].append(read_bytes_per_s(far))
        reads["near"].append(read_bytes_per_s(near))
    return times, reads


def buffer(num_bytes: int, threads: int) -> list[np.ndarray]:
    """Memory that is really there, a part for each thread."""
    return [np.ones(num_bytes // threads, np.uint8) for _ in range(threads)]


def read_bytes_per_s(parts: list[np.ndarray]) -> float:
    """How fast threads read memory, again and again: the best of five. numpy's maximum
    does nothing else (64 bytes an instruction), and leaves the interpreter's lock."""
    seconds = []
    for _ in range(5):
        threads = [threading.Thread(target=part.max) for part in parts]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds.append(time.perf_counter() - start)
    return sum(part.nbytes for part in parts) / min(seconds)


def memory_of_a_run(source: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """What a process needs at most that generates from an int8 checkpoint."""

    def ask(do: str, **arguments: object) -> Any:
        worker = Worker(sys.executable, str(HERE / "decode_ours.py"))
        answer = worker.ask(do, **arguments)
        worker.close()
        return answer

    few_bits.save_int8(str(source), str(folder))
    asked = {"folder": str(folder), "tokens": GENERATED}
    peak, idle, sizes = ask("generate", **asked), ask("idle"), ask("sizes", **asked)
    needed = sizes["weights"] + sizes["cache"]
    return {
        "peak_bytes": peak,
        "idle_bytes": idle,
        "weights_bytes": sizes["weights"],
        "cache_bytes": sizes["cache"],
        "peak_over_weights_and_cache": peak / needed,
        "peak_less_idle_over_weights_and_cache": (peak - idle) / needed,
    }


def rates(times: Times) -> dict[str, dict[str, dict[str, float]]]:
    """Medians in tokens/s, and the spread of their middle half."""
    found: dict[str, dict[str, float]] = {}
    spread: dict[str, dict[str, float]] = {}
    for label, cases in times.items():
        found[label] = {case: 1 / statistics.median(x) for case, x in cases.items()}
        spread[label] = {
            case: float(np.subtract(*np.percentile(x, [75, 25])) / np.median(x))
            for case, x in cases.items()
        }
    return {"tokens_per_s": found, "spread": spread}


def ratios(times: Times) -> dict[str, dict[str, float]]:
    """Ours over llama.cpp's."""
    found = rates(times)["tokens_per_s"]

    def over(mine: str, theirs: str, cases: dict[str, str]) -> dict[str, float]:
        return {
            short: found[mine][case] / found[theirs][case]
            for case, short in cases.items()
            if case in found.get(theirs, {})
        }

    cases = {"1": "1", "8": "8", "32": "32", "prefill 512": "prefill"}
    return {
        "ratio_to_llama_cpp": over(OURS, THEIRS, cases),
        "int4_ratio_to_llama_cpp": over(OURS_INT4, THEIRS_INT4, cases),
    }


def bandwidth(
    times: Times, reads: dict[str, list[float]], num_bytes: int
) -> dict[str, float]:
    """How fast the weights are read at batch 1, beside how fast memory can be read: a
    gigabyte, and as much as the weights are (which a large cache may hold)."""
    far, near = (statistics.median(reads[name]) for name in ("far", "near"))
    found = {"read_gb_per_s": far / 1e9, "read_again_gb_per_s": near / 1e9}
    if "1" in times[OURS]:
        rate = num_bytes / statistics.median(times[OURS]["1"])
        found |= {
            "weights_gb_per_s": rate / 1e9,
            "share_of_read": rate / far,
            "share_of_read_again": rate / near,
        }
    return found


def cpu_name() -> str:
    """What /proc/cpuinfo calls it."""
    text = pathlib.Path("/proc/cpuinfo").read_text()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else "unknown"


def table(result: dict[str, Any]) -> str:
    """Rates, each with its ratio to llama.cpp's, then the rest."""
    found = result["tokens_per_s"]
    cases = list(found[OURS])
    lines = [f"{'tokens/s (of Q8_0)':<24}" + "".join(f"{case:>16}" for case in cases)]
    for label, row in found.items():
        cells = []
        for case in cases:
            theirs = found.get(THEIRS, {}).get(case)
            mine = row.get(case)
            ratio = f" ({mine / theirs:4.2f})" if mine and theirs else ""
            cells.append(f"{mine:.1f}{ratio}" if mine else "-")
        lines.append(f"{label:<24}" + "".join(f"{cell:>16}" for cell in cells))
    if result["int4_ratio_to_llama_cpp"]:
        said = ", ".join(
            f"{case}: {ratio:.2f}"
            for case, ratio in result["int4_ratio_to_llama_cpp"].items()
        )
        lines.append(f"int4 to llama.cpp's Q4_0, {said}")
    for name, value in result.items():
        if isinstance(value, float):
            lines.append(f"{name:<44}{value:12.3f}")
    for name, value in result["memory"].items():
        shown = f"{value:12.3f}" if isinstance(value, float) else f"{value / 1e6:12.1f}"
        lines.append(f"{name.replace('_bytes', ' (MB)'):<44}{shown}")
    lines.append(
        f"{result['cpu']}, {result['threads']} threads, {result['rounds']} rounds"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
