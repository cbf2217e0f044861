"""Ask the compiler whether a plan is true: its memory, its collectives, its program.

Three fidelities: `estimate` is the planner's closed form and never comes here; `probe`
compiles the same step with few layers and extrapolates over the scan; `compile`
compiles the exact program. What does not fit comes back as DoesNotFit with the
compiler's own figure, never as "fits".
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh

from llmos_jax.errors import DoesNotFit, LowerError
from llmos_jax.ir import Plan
from llmos_jax.lowering.audit import audit
from llmos_jax.lowering.collectives import Collective, collectives_of, table
from llmos_jax.lowering.program import Program
from llmos_jax.telemetry import log

PROBE_LAYERS = (2, 4)
"""Layers of the probe's programs. XLA unrolls a loop of one, which is another program;
from two on, memory is a straight line in the number of layers."""

PROBE_EFFORT = {"exec_time_optimization_effort": -1.0}
"""Asked of XLA for a probe: it halves the time to compile and moves the memory of
llama3_70b's two layers for v5p:4x4x4 by less than 0.1 % (10.888 and 10.895 GB)."""

_EVERY_S = 20.0

Build = Callable[[Plan], tuple[Program, Mesh]]
"""Lower a plan's program for devices that need not be here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proof:
    """What one compiled program showed."""

    memory: dict[str, int]
    collectives: tuple[Collective, ...] | None
    compile_s: float
    text: str | None
    """None where jaxlib cannot print it: 0.10.2 fails on some TPU programs."""


def compile_plan(
    plan: Plan, build: Build, options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Compile the exact program; return the `compiled` part of `plan --json`.

    Args:
        plan: what is to be proved.
        build: lowers a plan.
        options: XLA flags beside the plan's.

    Raises:
        DoesNotFit: the compiler needs more memory than a device has.
        LowerError: no compiler for this machine, or it refused for another reason.
    """
    built = build(plan)
    with _progress(f"compiling {built[0].name} for {plan.topology.name}"):
        proof = _prove(built, options)
    _check_fits(plan, proof.memory["peak_hbm_bytes"])
    return _facts(plan, "compile", proof.memory, proof.collectives, proof)


def probe_plan(
    plan: Plan, build: Build, shortened: Callable[[Plan, int], Plan], layers: int
) -> dict[str, Any]:
    """Compile programs of few layers, and extrapolate to `layers`.

    Args:
        plan: what is to be proved.
        build: lowers a plan.
        shortened: the same plan for a model of so many layers.
        layers: of the whole model.

    Raises:
        DoesNotFit: what is extrapolated, or already a few layers, is too much.
        LowerError: as for `compile_plan`.
    """
    few, more = (min(count, layers) for count in PROBE_LAYERS)
    built = [build(shortened(plan, count)) for count in sorted({few, more})]
    with _progress(f"probing {plan.topology.name} with {few} and {more} layers"):
        with ThreadPoolExecutor(len(built)) as pool:
            proofs = list(pool.map(lambda one: _prove(one, PROBE_EFFORT), built))
    low, high = proofs[0], proofs[-1]
    if few == more:
        return _facts(plan, "probe", low.memory, low.collectives, low)

    def line(a: float, b: float) -> int:
        return round(a + (b - a) / (more - few) * (layers - few))

    memory = {key: line(low.memory[key], high.memory[key]) for key in low.memory}
    _check_fits(plan, memory["peak_hbm_bytes"])
    return _facts(plan, "probe", memory, _extended(low, high, line), high)


def _check_fits(plan: Plan, peak_bytes: float) -> None:
    limit = plan.topology.hbm_bytes_per_device
    if peak_bytes > limit:
        raise DoesNotFit(plan.topology.name, peak_bytes, limit)


def hlo_fingerprint(text: str) -> str:
    """Identity of a program: its optimized HLO without names of source lines."""
    bare = re.sub(rf"(?ms)^({_TABLES})\n.*?\n\n", "", text)
    bare = re.sub(r", metadata=\{[^}]*\}", "", bare)
    bare = re.sub(r"(?m)^(HloModule [^,]*),.*$", r"\1", bare)
    return hashlib.sha256(bare.encode()).hexdigest()[:16]


_TABLES = "FileNames|FunctionNames|FileLocations|StackFrames"
"""Paragraphs of HLO text that say where each instruction came from."""


def _prove(
    built: tuple[Program, Mesh], options: dict[str, Any] | None = None
) -> _Proof:
    program, mesh = built
    seconds = _compile(program, options)
    text = _text(program)
    return _Proof(
        memory=program.memory(),
        collectives=None if text is None else collectives_of(text, mesh),
        compile_s=seconds,
        text=text,
    )


def _compile(program: Program, options: dict[str, Any] | None) -> float:
    """Compile with options, or without where this jaxlib knows them no more (0.12)."""
    try:
        return program.compile(options)
    except LowerError as problem:
        if options and "No such compile option" in str(problem):
            return program.compile()
        raise


def _text(program: Program) -> str | None:
    """The optimized HLO; compiled with less effort where it cannot be printed.

    jaxlib 0.10.2 cannot print some of libtpu's asynchronous instructions. With less
    effort there are none, and the partitioner, which makes the collectives, is the
    same.
    """
    for attempt in (program, replace(program, _compiled=[])):
        try:
            _compile(attempt, PROBE_EFFORT)
            return attempt.as_text()
        except jax.errors.JaxRuntimeError as problem:
            line = (str(problem).splitlines() or [""])[0][:120]
            log(f"this jaxlib cannot print the program ({line})")
    log("no audit of collectives")
    return None


def _extended(
    low: _Proof, high: _Proof, line: Callable[[float, float], int]
) -> tuple[Collective, ...] | None:
    """The collectives of the whole model: what grows with the layers, grown."""
    if low.collectives is None or high.collectives is None:
        return None
    before, after = _counts(low.collectives), _counts(high.collectives)
    extended = []
    for item in high.collectives:
        key = _identity(item)
        if key in after:  # alike ones are counted together, in the first's place
            count = after.pop(key)
            grown = line(before[key], count) if key in before else count
            extended.append(replace(item, count=grown))
    return tuple(extended)


def _counts(items: Iterable[Collective]) -> dict[tuple[Any, ...], int]:
    counts: dict[tuple[Any, ...], int] = {}
    for item in items:
        counts[_identity(item)] = counts.get(_identity(item), 0) + item.count
    return counts


def _identity(item: Collective) -> tuple[Any, ...]:
    return (item.op, item.axes, item.link, item.where, item.arrays, item.sliced)


def _facts(
    plan: Plan,
    fidelity: str,
    memory: dict[str, int],
    collectives: tuple[Collective, ...] | None,
    proof: _Proof,
) -> dict[str, Any]:
    found = table(collectives or ())
    wrong = audit(collectives or (), plan)
    return {
        "fidelity": fidelity,
        **{
            key: memory[key]
            for key in ("peak_hbm_bytes", "argument_bytes", "temp_bytes")
        },
        "compile_s": proof.compile_s,
        "jax": jax.__version__,
        "libtpu": _version("libtpu"),
        "audited": collectives is not None,
        "collectives": found,
        "unplanned_collectives": [one.to_json() for one in wrong],
        "hlo_fingerprint": None if proof.text is None else hlo_fingerprint(proof.text),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _progress(what: str) -> Iterator[None]:
    """Say on stderr what takes so long, and for how long it has."""
    started, done = time.perf_counter(), threading.Event()

    def tell() -> None:
        while not done.wait(_EVERY_S):
            log(f"{what}: {time.perf_counter() - started:.0f} s")

    log(f"{what} (no chip is needed; minutes for large models)")
    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
