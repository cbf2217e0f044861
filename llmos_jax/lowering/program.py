"""Turn a function and a plan into a Program: jitted, sharded, donated, inspectable.

A Program answers the questions every stage answers: `as_text`, `memory`, `compile`. It
can be lowered for devices that are not here, as long as nothing calls it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from llmos_jax.errors import LowerError
from llmos_jax.ir import Plan
from llmos_jax.lowering.shardings import annotator
from llmos_jax.models import annotated_by


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """One function of a plan, with the abstract arguments it was lowered for."""

    name: str
    plan_fingerprint: str
    function: Any
    """A jax.jit function; calling the Program calls it."""
    arguments: tuple[Any, ...]
    """ShapeDtypeStructs with shardings."""
    _compiled: list[Any] = field(default_factory=list, repr=False, compare=False)

    def __call__(self, *arguments: Any) -> Any:
        """Run what `compile` compiled; without it, jit compiles at the first call."""
        return (self._compiled or [self.function])[0](*arguments)

    def compile(self) -> float:
        """Compile for the devices of the mesh, without running; return seconds taken.

        Raises:
            LowerError: the compiler refused, for example because memory does not
            suffice.
        """
        if self._compiled:
            return 0.0
        start = time.perf_counter()
        try:
            self._compiled.append(self.function.lower(*self.arguments).compile())
        except jax.errors.JaxRuntimeError as problem:
            line = str(problem).splitlines()[0][:400]
            raise LowerError(
                f"XLA could not compile {self.name}: {line} "
                "Plan for less memory: a smaller batch.per_device, plan.remat=full, "
                "or more devices."
            ) from None
        return time.perf_counter() - start

    def memory(self) -> dict[str, int]:
        """Bytes per device as the compiler accounts for them."""
        self.compile()
        analysis = self._compiled[0].memory_analysis()
        sizes = {
            "argument_bytes": analysis.argument_size_in_bytes,
            "output_bytes": analysis.output_size_in_bytes,
            "alias_bytes": analysis.alias_size_in_bytes,
            "temp_bytes": analysis.temp_size_in_bytes,
        }
        sizes["peak_hbm_bytes"] = (
            sizes["argument_bytes"]
            + sizes["output_bytes"]
            + sizes["temp_bytes"]
            - sizes["alias_bytes"]
        )
        return sizes

    def as_text(self) -> str:
        """The optimized HLO."""
        self.compile()
        return str(self._compiled[0].as_text())


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

    def traced(*values: Any) -> Any:
        with annotated_by(annotator(plan, mesh)):
            return function(*values)

    traced.__name__ = name
    jitted = jax.jit(traced, out_shardings=out_shardings, donate_argnums=donate)
    return Program(
        name=name,
        plan_fingerprint=plan.fingerprint,
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
