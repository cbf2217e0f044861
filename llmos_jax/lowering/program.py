"""Turn a function and a plan into a Program: jitted, sharded, donated, inspectable.

A Program answers the questions every stage answers: `as_text`, `memory`, `compile`. It
can be lowered for devices that are not here, as long as nothing calls it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from llmos_jax.errors import DoesNotFit, LowerError
from llmos_jax.ir import Plan
from llmos_jax.kernels.target import Target, lowered_for
from llmos_jax.lowering.shardings import MeshSharder
from llmos_jax.lowering.topologies import quiet
from llmos_jax.models import annotated_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One function of a plan, with the abstract arguments it was lowered for."""

    name: str
    plan_fingerprint: str
    machine: str
    """The topology it is for."""
    is_for_tpu: bool
    function: Any
    """A jax.jit function; calling the Program calls it."""
    arguments: tuple[Any, ...]
    """ShapeDtypeStructs with shardings."""
    _compiled: list[Any] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, *arguments: Any) -> Any:
        """Run what `compile` compiled; without it, jit compiles at the first call."""
        return (self._compiled or [self.function])[0](*arguments)

    def compile(self, options: dict[str, Any] | None = None) -> float:
        """Compile for the devices of the mesh, without running; return seconds taken.

        Args:
            options: XLA flags for this compile.

        Raises:
            DoesNotFit: memory does not suffice, with the compiler's own figure.
            LowerError: the compiler refused for another reason.
        """
        if self._compiled:
            return 0.0
        start = time.perf_counter()
        lowered = self.function.lower(*self.arguments)
        try:
            with quiet():
                self._compiled.append(lowered.compile(compiler_options=options))
        except jax.errors.JaxRuntimeError as problem:
            memory = memory_refused(str(problem))
            if memory is not None:
                raise DoesNotFit(self.machine, *memory) from None
            line = str(problem).splitlines()[0][:400]
            raise LowerError(
                f"XLA could not compile {self.name} for {self.machine}: {line}"
            ) from None
        return time.perf_counter() - start

    def memory(self) -> dict[str, int]:
        """Bytes per device as the compiler accounts for them.

        `peak_hbm_bytes` is what decides whether the program fits: on TPUs the
        compiler's own total, which can be below arguments and temporaries added up;
        elsewhere that sum.
        """
        self.compile()
        analysis = self._compiled[0].memory_analysis()
        sizes = {
            "argument_bytes": analysis.argument_size_in_bytes,
            "output_bytes": analysis.output_size_in_bytes,
            "alias_bytes": analysis.alias_size_in_bytes,
            "temp_bytes": analysis.temp_size_in_bytes,
            "host_bytes": analysis.host_temp_size_in_bytes,
        }
        added = (
            sizes["argument_bytes"]
            + sizes["output_bytes"]
            + sizes["temp_bytes"]
            - sizes["alias_bytes"]
        )
        total = getattr(analysis, "peak_memory_in_bytes", 0)
        sizes["peak_hbm_bytes"] = total if self.is_for_tpu and total else added
        return sizes

    def as_text(self) -> str:
        """The optimized HLO."""
        self.compile()
        return str(self._compiled[0].as_text())


def memory_refused(message: str) -> tuple[float, float] | None:
    """Read (bytes needed, bytes there) off XLA's words for too little memory.

    TPU: "Ran out of memory in memory space hbm. Used 31.62G of 31.24G hbm." or "the
    total memory required for HLO temporaries (26.84G) exceeds available HBM (15.75G)";
    G is 2**30. None for any other message.
    """
    size = r"([0-9.]+)([KMGT]?)"
    for pattern in (
        rf"Used {size} of {size} hbm",
        rf"HLO temporaries \({size}\) exceeds available HBM \({size}\)",
    ):
        found = re.search(pattern, message)
        if found:
            needed, unit, limit, limit_unit = found.groups()
            return float(needed) * _UNITS[unit], float(limit) * _UNITS[limit_unit]
    return None


_UNITS = {"": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}


def lower(
    name: str,
    function: Callable[..., Any],
    plan: Plan,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    *,
    out_shardings: Any = None,
    donate: tuple[int, ...] = (),
) -> Program:
    """Lower `function` under a plan.

    Args:
        name: shown in errors and traces.
        function: pure; its model code annotates activations.
        plan: where the annotations' meaning comes from.
        mesh: from `device_mesh`.
        arguments: ShapeDtypeStructs (or arrays) with shardings.
        out_shardings: a tree of shardings, or None to let the compiler choose.
        donate: positions of arguments whose memory the outputs may take.
    """

    target = Target(mesh.devices.flat[0].platform, mesh.size)

    def traced(*values: Any) -> Any:
        with annotated_by(MeshSharder(plan, mesh)), lowered_for(target):
            return function(*values)

    traced.__name__ = name
    jitted = jax.jit(
        traced,
        out_shardings=out_shardings,
        donate_argnums=donate,
    )
    return Program(
        name=name,
        plan_fingerprint=plan.fingerprint,
        machine=plan.topology.name,
        is_for_tpu=target.platform == "tpu",
        function=jitted,
        arguments=arguments,
    )


def abstract(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` with `shardings` attached."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        tree,
        shardings,
    )
