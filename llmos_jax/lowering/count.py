"""Turn a function into its floating point operations and bytes, by reading its jaxpr.

XLA's own `cost_analysis` counts a scanned body once and cannot see into Pallas kernels.
Here a scan counts its body times its length, a shard_map its body times its shards, and
what a gradient recomputes is counted because it stands in the jaxpr. Counts are of the
whole program, over all devices, after dead code is dropped.

| what | FLOPs | bytes |
|---|---|---|
| dot_general, ragged_dot, convolution | 2 per multiply-add | operands and result |
| elementwise, transcendental too | 1 per element of the result | none: fused |
| reduction, cumulative sum | 1 per element of the operand | none: fused |
| gather, dynamic_slice | none | twice the result, and the indices |
| scatter, dynamic_update_slice | 1 per update where it adds | twice the updates |
| sort | n log2 n comparisons | operands and results |
| collective | 1 per element where it reduces | operands and result |
| foreign function, callback | none, and named as opaque | arguments and results |
| pallas_call | its cost_estimate, else body x grid | the same, else its arguments |
| reshape, transpose, convert, broadcast, ... | none | none: fused |

Known lies: elementwise work is taken to fuse perfectly; masked and padded elements
count; of a cond's branches the dearest one counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.interpreters import partial_eval

from llmos_jax.errors import LowerError


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Work of one call of a function, over all devices."""

    flops: int = 0
    matmul_flops: int = 0
    """The part of `flops` in dot_general, ragged_dot and convolutions."""
    bytes: int = 0
    by_primitive: dict[str, int] = field(default_factory=dict)
    """Primitive -> its part of `flops`; what has none is left out."""
    opaque: frozenset[str] = frozenset()
    """Foreign functions that are called: their work cannot be seen and is missing."""

    def __add__(self, other: Count) -> Count:
        names = {**self.by_primitive, **other.by_primitive}
        return Count(
            flops=self.flops + other.flops,
            matmul_flops=self.matmul_flops + other.matmul_flops,
            bytes=self.bytes + other.bytes,
            by_primitive={
                name: self.by_primitive.get(name, 0) + other.by_primitive.get(name, 0)
                for name in names
            },
            opaque=self.opaque | other.opaque,
        )

    def __mul__(self, times: int) -> Count:
        return Count(
            flops=self.flops * times,
            matmul_flops=self.matmul_flops * times,
            bytes=self.bytes * times,
            by_primitive={name: n * times for name, n in self.by_primitive.items()},
            opaque=self.opaque,
        )


def count(function: Callable[..., Any], *abstract_args: Any) -> Count:
    """Count the work of `function(*abstract_args)`; nothing is compiled or run.

    Args:
        function: what can be traced, jitted or not.
        abstract_args: arrays, ShapeDtypeStructs, or trees of them.

    Raises:
        LowerError: a `while` loop whose length the jaxpr does not say.
    """
    jaxpr = jax.make_jaxpr(function)(*abstract_args).jaxpr
    used = [True] * len(jaxpr.outvars)
    alive, _ = partial_eval.dce_jaxpr(jaxpr, used)
    return _of_jaxpr(alive)


def _of_jaxpr(jaxpr: Any) -> Count:
    """Count a jaxpr, closed or not."""
    inner = getattr(jaxpr, "jaxpr", jaxpr)
    total = Count()
    for equation in inner.eqns:
        total += _of_equation(equation)
    return total


def _of_equation(equation: Any) -> Count:
    name, params = equation.primitive.name, equation.params
    if name in _CONTROL:
        return _CONTROL[name](equation)
    if name in _MATMULS:
        flops = _MATMULS[name](equation)
        return _work(name, flops, _bytes(equation), matmul=True)
    if name.startswith("scatter") or name in _MOVED:
        return _moved(equation)
    if name in _COLLECTIVES:
        flops = _elements(equation.outvars) if _COLLECTIVES[name] else 0
        return _work(name, flops, _bytes(equation))
    if name in _OPAQUE:
        called = str(params.get("target_name", params.get("call_target_name", name)))
        return Count(bytes=_bytes(equation), opaque=frozenset({called}))
    if name == "sort":
        length = equation.invars[0].aval.shape[params["dimension"]]
        depth = math.ceil(math.log2(max(2, length)))
        return _work(name, equation.invars[0].aval.size * depth, _bytes(equation))
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in params and name not in _REDUCERS:
            return _of_jaxpr(params[key])
    if name in _FREE or name.startswith("random_"):
        return Count()
    if name.startswith(("reduce_", "cum", "arg")) or name in _REDUCERS:
        return _work(name, equation.invars[0].aval.size)
    return _work(name, _elements(equation.outvars))


def _work(name: str, flops: int, moved: int = 0, *, matmul: bool = False) -> Count:
    return Count(
        flops=flops,
        matmul_flops=flops if matmul else 0,
        bytes=moved,
        by_primitive={name: flops} if flops else {},
    )


def _elements(variables: Iterable[Any]) -> int:
    return sum(int(getattr(one.aval, "size", 0)) for one in variables)


def _size(variable: Any) -> int:
    """Bytes of an array; keys and tokens have none."""
    dtype = getattr(variable.aval, "dtype", None)
    width = getattr(dtype, "itemsize", 0)
    return int(getattr(variable.aval, "size", 0)) * int(width)


def _bytes(equation: Any) -> int:
    return sum(_size(one) for one in (*equation.invars, *equation.outvars))


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    lhs = equation.invars[0].aval
    depth = math.prod(int(lhs.shape[dim]) for dim in contracted)
    return 2 * int(equation.outvars[0].aval.size) * depth


def _ragged_dot(equation: Any) -> int:
    """Every row of the ragged dimension meets one group."""
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (contracted, _), _ = numbers.dot_dimension_numbers
    lhs, _, groups = (one.aval for one in equation.invars[:3])
    depth = math.prod(int(lhs.shape[dim]) for dim in contracted)
    flops = 2 * int(equation.outvars[0].aval.size) * depth
    is_contracted = numbers.lhs_ragged_dimensions[0] in contracted
    return flops // int(groups.shape[-1]) if is_contracted else flops


def _convolution(equation: Any) -> int:
    kernel = equation.invars[1].aval
    out_dim = equation.params["dimension_numbers"].rhs_spec[0]
    depth = kernel.size // kernel.shape[out_dim]
    return 2 * int(equation.outvars[0].aval.size) * int(depth)


_MATMULS: dict[str, Callable[[Any], int]] = {
    "dot_general": _dot,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
}


def _moved(equation: Any) -> Count:
    """Reads or writes at places in a large array, which itself stays where it is."""
    name, ins = equation.primitive.name, equation.invars
    if name.startswith("scatter"):
        adds = 0 if name == "scatter" else int(ins[2].aval.size)
        return _work(name, adds, _size(ins[1]) + 2 * _size(ins[2]))
    if name == "dynamic_update_slice":
        return _work(name, 0, 2 * _size(ins[1]))
    indices = _size(ins[1]) if name == "gather" else 0
    return _work(name, 0, 2 * _size(equation.outvars[0]) + indices)


def _scan(equation: Any) -> Count:
    return _of_jaxpr(equation.params["jaxpr"]) * int(equation.params["length"])


def _cond(equation: Any) -> Count:
    counts = [_of_jaxpr(branch) for branch in equation.params["branches"]]
    return max(counts, key=lambda one: (one.flops, one.bytes))


def _while(equation: Any) -> Count:
    params = equation.params
    trips = _trips(equation)
    if trips is None:
        raise LowerError(
            "a while loop's work cannot be counted: the jaxpr does not say how often "
            "it runs. Use lax.scan, or lax.fori_loop with bounds that are numbers."
        )
    body, test = _of_jaxpr(params["body_jaxpr"]), _of_jaxpr(params["cond_jaxpr"])
    return body * trips + test * (trips + 1)


def _trips(equation: Any) -> int | None:
    """Length of `while i < n: i += step` if start, n and step are literals."""
    params, skipped = equation.params, equation.params["cond_nconsts"]
    carried = equation.invars[skipped + params["body_nconsts"] :]
    test, body = params["cond_jaxpr"].jaxpr, params["body_jaxpr"].jaxpr
    if len(test.eqns) != 1 or test.eqns[0].primitive.name != "lt":
        return None
    counter, limit = test.eqns[0].invars
    places = {id(one): place for place, one in enumerate(test.invars)}
    if id(counter) not in places or places[id(counter)] < skipped:
        return None
    at = places[id(counter)] - skipped
    end = _number(limit)
    if end is None and id(limit) in places:
        place = places[id(limit)]
        outer = equation.invars[place] if place < skipped else carried[place - skipped]
        end = _number(outer)
    start, step = _number(carried[at]), _step(body, at, params["body_nconsts"])
    if start is None or end is None or not step:
        return None
    return max(0, -(-(end - start) // step))


def _step(body: Any, at: int, skipped: int) -> int | None:
    before, after = body.invars[skipped + at], body.outvars[at]
    for equation in body.eqns:
        is_step = equation.primitive.name == "add" and after in equation.outvars
        if is_step and equation.invars[0] is before:
            return _number(equation.invars[1])
        if is_step and equation.invars[1] is before:
            return _number(equation.invars[0])
    return None


def _number(variable: Any) -> int | None:
    value = getattr(variable, "val", None)
    if value is None or np.ndim(value) or not np.issubdtype(np.result_type(value), int):
        return None
    return int(value)


def _shard_map(equation: Any) -> Count:
    params = equation.params
    sizes = dict(params["mesh"].shape)
    shards = math.prod(int(sizes[axis]) for axis in params["newly_manual_axes"])
    return _of_jaxpr(params["jaxpr"]) * shards


def _pallas_call(equation: Any) -> Count:
    params = equation.params
    said = params.get("cost_estimate")
    if said is not None:
        return _work("pallas_call", int(said.flops), int(said.bytes_accessed))
    steps = math.prod(int(size) for size in params["grid_mapping"].grid)
    body = _of_jaxpr(params["jaxpr"]) * steps
    return Count(
        flops=body.flops,
        matmul_flops=body.matmul_flops,
        bytes=_bytes(equation),
        by_primitive=body.by_primitive,
    )


_CONTROL: dict[str, Callable[[Any], Count]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
}

_OPAQUE = frozenset({"ffi_call", "custom_call", "pure_callback", "io_callback"})

_MOVED = frozenset({"gather", "dynamic_slice", "dynamic_update_slice"})

_COLLECTIVES = {
    "psum": True,
    "psum_invariant": True,
    "pmax": True,
    "pmin": True,
    "reduce_scatter": True,
    "all_gather": False,
    "all_gather_invariant": False,
    "all_to_all": False,
    "ragged_all_to_all": False,
    "ppermute": False,
    "pbroadcast": False,
}
"""Collectives of a shard_map body -> whether they reduce."""

_REDUCERS = frozenset({"reduce", "reduce_window", "top_k", "approx_top_k"})
"""Reductions whose names do not say so; their jaxprs combine two elements."""

_FREE = frozenset(
    """
    axis_index bitcast_convert_type broadcast_in_dim concatenate convert_element_type
    copy copy_p create_token device_put empty expand_dims get iota layout_constraint
    mesh_cast name num_programs optimization_barrier pad partition_id platform_index
    program_id pvary reshape rev sharding_constraint slice split squeeze stop_gradient
    swap transpose
    """.split()
)
"""Places, shapes and types change, no value does; XLA fuses these into their users."""
