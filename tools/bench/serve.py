#!/usr/bin/env python3
"""Serve SmolLM2-135M in int8 to many clients, against llama-server of llama.cpp.

    LLMOS_LLAMA_SERVER=... .venv/bin/python tools/bench/serve.py [--json] [--ours-only]

Both serve the same float model in 8 bits, ours as `serve` does and as Q8_0, each alone
on the same cores, taking turns round after round; medians. So many clients each ask
one stream after another: 128 prompt tokens that nobody had before, 128 answer tokens,
greedy. "16 shared" are 16 clients whose prompts begin with the same 512 tokens and end
with 16 of their own, for 64 tokens. The clients are one process on the same cores. A
gap is between two events, which may bring several tokens.

On a machine that others use, --patience S waits for them, and repeats turns in which
they took more than a tenth of the processors, for S seconds in all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"

from decode import cpu_name, pin
from serve_load import Case, Figures, LoadFailed, load
from serve_servers import (
    HOW,
    Server,
    ServerDied,
    llama_server,
    start_ours,
    start_theirs,
)
from workers import note

CASES = (
    *(Case(name=str(clients), clients=clients) for clients in (1, 4, 16, 32)),
    Case(name="16 shared", clients=16, shared=512, own=16, answer=64),
)
WARM_UP = Case(name="warm-up", clients=2, own=32, answer=16)
OURS, THEIRS = "ours", "theirs"
MOST_OTHERS = 0.1
"""Share of the processors that others may have in a turn."""
HOST_CASE = "16"
"""Where the host's share is told."""

Turns = dict[str, dict[str, list[dict[str, float]]]]
"""Who -> case -> figures of every round."""


@dataclass(slots=True, kw_only=True)
class Patience:
    """Seconds that turns may still wait for, or lose to, what else runs here."""

    left_s: float

    def measure(
        self, server: Server, turn: Callable[[int], Figures]
    ) -> dict[str, float]:
        """Figures of a turn, with the share of the processors that `others` had.

        `turn` takes how often it was tried before.
        """
        for tried in itertools.count():
            self._wait()
            begun, share = time.perf_counter(), _others(server)
            found = asdict(turn(tried)) | {"others": share()}
            if found["others"] <= MOST_OTHERS or self.left_s <= 0:
                return found
            self.left_s -= time.perf_counter() - begun
            note(f"once more: others had {found['others']:.0%} of the processors")
        raise AssertionError("a count has no end")

    def _wait(self) -> None:
        while self.left_s > 0:
            share = _others()
            time.sleep(1)
            self.left_s -= 1
            if share() <= MOST_OTHERS / 2:
                return


@dataclass(slots=True, kw_only=True)
class Found:
    """What all turns gave."""

    turns: Turns = field(default_factory=lambda: {OURS: {}, THEIRS: {}})
    ready_s: list[float] = field(default_factory=list)
    engine: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    """Case -> what our engine says of itself, of every round."""


@dataclass(slots=True, kw_only=True)
class Bench:
    """What is compared, and how a turn goes."""

    ours: pathlib.Path
    theirs: pathlib.Path
    program: str | None
    """llama-server; None: ours alone."""
    folder: pathlib.Path
    """For logs."""
    threads: int
    seconds: float
    least: int
    patience: Patience

    def start_ours(self) -> Server:
        """Serve our model."""
        return start_ours(self.ours, self.folder)

    def start_theirs(self, case: Case) -> Server:
        """Serve theirs, with as many slots as there are clients."""
        assert self.program is not None
        sizes = {"clients": case.clients, "context": case.context}
        return start_theirs(
            self.program, self.theirs, self.folder, threads=self.threads, **sizes
        )

    def turn(
        self, who: str, server: Server, case: Case, number: int
    ) -> dict[str, float]:
        """Figures of one load on a server that runs."""
        url, model = server.url, server.model

        def once(tried: int) -> Figures:
            seed = 1000 * number + tried
            seconds, least = self.seconds, self.least
            return load(url, model, case, seconds=seconds, least=least, seed=seed)

        load(url, model, WARM_UP, seconds=0, least=1, seed=number)
        said = self.patience.measure(server, once)
        note(
            f"round {number}  {who:<7}{case.name:<10}{said['tokens_per_s']:8.1f}/s  "
            f"first {said['first_median_s']:.3f} s  others {said['others']:.0%}"
        )
        return said


def main() -> None:
    """Take turns, then print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=15, help="of a turn")
    parser.add_argument("--least", type=int, default=1, help="requests of a client")
    parser.add_argument("--only", default="", help="cases, with commas between")
    parser.add_argument("--patience", type=float, default=0, metavar="S")
    parser.add_argument("--ours", metavar="FOLDER", help="instead of SmolLM2 in int8")
    parser.add_argument("--theirs", metavar="FILE", help="the same as GGUF")
    asked = parser.parse_args()
    program = None if asked.ours_only else llama_server()
    if program is None and not asked.ours_only:
        sys.exit(f"error: {HOW}")
    cases = [
        case for case in CASES if not asked.only or case.name in asked.only.split(",")
    ]
    if not cases:
        sys.exit(f"error: --only {asked.only} names none of {[c.name for c in CASES]}.")
    pin(asked.threads)
    with tempfile.TemporaryDirectory() as made:
        folder = pathlib.Path(made)
        ours, theirs = models(asked, folder)
        bench = Bench(
            ours=ours,
            theirs=theirs,
            program=program,
            folder=folder,
            threads=asked.threads,
            seconds=asked.seconds,
            least=asked.least,
            patience=Patience(left_s=asked.patience),
        )
        try:
            found = take_turns(bench, cases, asked.rounds)
        except (ServerDied, LoadFailed) as problem:
            sys.exit(f"error: {problem}")
    result = {
        **summary(found),
        "threads": asked.threads,
        "rounds": asked.rounds,
        "cpu": cpu_name(),
    }
    print(json.dumps(result) if asked.json else table(result))


def models(
    asked: argparse.Namespace, folder: pathlib.Path
) -> tuple[pathlib.Path, pathlib.Path]:
    """Our checkpoint and their file, made of the same float model where not given."""
    import few_bits

    from llmos_jax import driver

    ours, theirs = folder / "int8", folder / "q8_0.gguf"
    if not asked.ours:
        few_bits.save_int8(str(few_bits.model_file("smollm2")), str(ours))
    if not asked.theirs and not asked.ours_only:
        source = few_bits.model_file("smollm2")
        driver.convert(str(source), str(theirs), kind="q8_0")
    return pathlib.Path(asked.ours or ours), pathlib.Path(asked.theirs or theirs)


def take_turns(bench: Bench, cases: list[Case], rounds: int) -> Found:
    """All cases of ours, then all of theirs, round after round."""
    found = Found()
    bench.start_ours().close()  # compiles
    for number in range(1, rounds + 1):
        server = bench.start_ours()
        found.ready_s.append(server.ready_s)
        try:
            for case in cases:
                before = server.get("/state")["state"]
                said = bench.turn(OURS, server, case, number)
                after = server.get("/state")["state"]
                found.turns[OURS].setdefault(case.name, []).append(said)
                told = engine_figures(before, after)
                found.engine.setdefault(case.name, []).append(told)
        finally:
            server.close()
        for case in cases if bench.program else ():
            server = bench.start_theirs(case)
            try:
                said = bench.turn(THEIRS, server, case, number)
                found.turns[THEIRS].setdefault(case.name, []).append(said)
            finally:
                server.close()
    return found


def engine_figures(
    before: dict[str, float], after: dict[str, float]
) -> dict[str, float]:
    """What our engine says of the time between two readings of /state."""
    names = ("steps", "step_s", "host_s", "generated_tokens", "prefix_hits")
    more = {name: after[name] - before[name] for name in names}
    # A step's seconds begin when it is sent: those of the host come before.
    passed = more["step_s"] + more["host_s"]
    planned = after["planned_bandwidth"]
    return {
        "host_share": more["host_s"] / passed if passed else 0.0,
        "step_ms": 1e3 * more["step_s"] / max(1, more["steps"]),
        "gb_per_s": after["bandwidth"] / 1e9,
        "bandwidth_share": after["bandwidth"] / planned if planned else 0.0,
        "prefix_hit_tokens": more["prefix_hits"],
    }


def medians(rows: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def summary(found: Found) -> dict[str, Any]:
    """Medians of all rounds by the number of clients, and ours over theirs."""
    middle = {
        who: {case: medians(rows) for case, rows in cases.items()}
        for who, cases in found.turns.items()
    }
    engine = {case: medians(rows) for case, rows in found.engine.items()}

    def pairs(name: str) -> dict[str, dict[str, float]]:
        return {
            case: {
                who: rows[case][name] for who, rows in middle.items() if case in rows
            }
            for case in middle[OURS]
        }

    rates = pairs("tokens_per_s")
    for pair in rates.values():
        if THEIRS in pair:
            pair["ratio"] = pair[OURS] / pair[THEIRS]
    return {
        "clients": rates,
        "ttft_median_s": pairs("first_median_s"),
        "ttft_p95_s": pairs("first_p95_s"),
        "gap_p95_s": pairs("gap_p95_s"),
        "requests": pairs("requests"),
        "others_share": pairs("others"),
        "ready_s": statistics.median(found.ready_s),
        "host_share": engine.get(HOST_CASE, {}).get("host_share"),
        "engine": engine,
    }


def table(result: dict[str, Any]) -> str:
    """A row for each number of clients."""
    columns = {
        "clients": "tokens/s",
        "ttft_median_s": "first median",
        "ttft_p95_s": "first p95",
        "gap_p95_s": "gap p95",
    }
    head = [f"{f'{title}: ours':>19}{'theirs':>9}" for title in columns.values()]
    lines = [f"{'clients':<10}" + "".join(head) + f"{'ratio':>8}{'host':>7}"]
    for case, pair in result["clients"].items():
        line = f"{case:<10}"
        for name in columns:
            digits = 1 if name == "clients" else 3
            cells = [result[name][case].get(who) for who in (OURS, THEIRS)]
            shown = ["-" if one is None else f"{one:.{digits}f}" for one in cells]
            line += f"{shown[0]:>19}{shown[1]:>9}"
        ratio = f"{pair['ratio']:.2f}" if "ratio" in pair else "-"
        lines.append(line + f"{ratio:>8}{result['engine'][case]['host_share']:7.1%}")
    for case, told in result["engine"].items():
        lines.append(
            f"{case:<10}{told['gb_per_s']:6.1f} GB/s, {told['bandwidth_share']:.2f} of "
            f"the plan's most; steps of {told['step_ms']:.1f} ms"
        )
    others = [
        share for pair in result["others_share"].values() for share in pair.values()
    ]
    lines += [
        f"ready after {result['ready_s']:.1f} s with programs cached; "
        f"others had up to {max(others):.0%} of the processors",
        f"{result['cpu']}, {result['threads']} threads, {result['rounds']} rounds",
    ]
    return "\n".join(lines)


def _others(server: Server | None = None) -> Callable[[], float]:
    """Begin to watch the processors that this process may use; the result says what
    share of them neither it nor the server had since."""
    cpus = os.sched_getaffinity(0)

    def reading() -> tuple[float, float]:
        mine = time.process_time() + (server.cpu_s() if server else 0)
        return time.perf_counter(), busy_s(cpus) - mine

    begun, busy = reading()

    def share() -> float:
        now, busy_now = reading()
        return max(0.0, busy_now - busy) / (len(cpus) * (now - begun))

    return share


def busy_s(cpus: set[int]) -> float:
    """Seconds that these processors have not been idle."""
    total = 0
    for line in pathlib.Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name.startswith("cpu") and name[3:].isdigit() and int(name[3:]) in cpus:
            user, nice, system, _, _, irq, soft_irq, steal = map(int, ticks[:8])
            total += user + nice + system + irq + soft_irq + steal
    return total / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
