"""Turn a mesh and resolved specs into what one device holds and exchanges.

Roles are read off the rules, not restated. The batch axes are those that split `batch`.
A weight split over a batch axis is gathered before use (fsdp); split over another one
it is used in parts (tensor); its gradient is summed over the batch axes that do not
split it (data). Everything the cost and memory formulas need is counted here, once per
mesh.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmos_jax.errors import RuleError
from llmos_jax.ir.params import ParamRow, ParamTable
from llmos_jax.ir.plan import MeshShape
from llmos_jax.ir.rules import Rules, Spec, mesh_axes_in
from llmos_jax.ir.workload import Workload
from llmos_jax.planner.sizes import Sizes
from llmos_jax.planner.stored import served_bytes
from llmos_jax.rules import resolve, resolve_activation
from llmos_jax.rules.resolve import nearest_text

Group = tuple[str, ...]
"""Mesh axes that take part in one collective, in mesh order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Bytes of one device's parameters in a step that serves: few-bit values and their
    scales as they are stored, all else in one dtype."""

    kept: float
    gathers: dict[Group, float]
    """Mesh axes -> a device's part once gathered over them."""
    layer: float
    """One layer as a device uses it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Counts of one device on one mesh; `elements` are parameters, not bytes.

    Compared by identity, so that what was derived from one can be remembered.
    """

    mesh: MeshShape
    specs: dict[str, Spec]
    batch_ways: int
    """Ways the batch is split."""
    token_ways: int
    """Ways the tokens are split: along the batch and along the sequence."""
    residual_ways: int
    """Ways a device's tokens are split once more between blocks: 1, or `tensor`."""
    width_ways: dict[str, int]
    """Ways of each activation width: heads, kv_heads, ffn, vocab, embed."""
    width_axes: dict[str, Group]
    sharded: float
    """Parameters one device keeps."""
    trained: float
    """Of these, what has gradients and an optimizer's state."""
    unstaged: float
    """Of these, what every stage of a pipeline has: all but the layers. 0 without
    one."""
    gathers: dict[Group, float]
    """Mesh axes -> parameters of one device's part once gathered over them."""
    sums: dict[Group, float]
    """Mesh axes -> gradient elements that are summed over them."""
    gathered_layer: float
    """Parameters of one layer as a device uses them."""
    is_layer_gathered: bool
    gathered_rest: float
    """The largest single parameter outside the layers, as used."""
    served: Served
    """Bytes of what serves."""


def lay_out(
    table: ParamTable, rules: Rules, sizes: Sizes, workload: Workload, mesh: MeshShape
) -> Layout:
    """Resolve the rules on `mesh` and count.

    Raises:
        RuleError: a dimension of the batch, of a sequence, a weight or a width that
            does not divide.
    """
    specs = resolve(rules, table, mesh)
    batch_axes = _axes_of(rules, "batch", workload.global_batch, mesh)
    token_axes = batch_axes | _axes_of(rules, "seq", workload.seq_len, mesh)
    residual_ways = _residual_ways(rules, workload, mesh)
    # Replicas that take steps alone sum no gradients; what they send is in `traffic`.
    alone = {"data"} if workload.local_steps else set()
    width_axes = _width_axes(rules, sizes, mesh)
    gathers: dict[Group, float] = {}
    sums: dict[Group, float] = {}
    sharded = trained = unstaged = gathered_layer = gathered_rest = 0.0
    is_layer_gathered = False
    width, served_gathers = served_bytes(table, workload), dict[Group, float]()
    served_kept = served_layer = 0.0
    for row in table.rows:
        split = mesh_axes_in(specs[row.path])
        gathered = tuple(
            axis
            for axis in split
            if axis in token_axes and axis not in _expert_axes(row, specs[row.path])
        )
        summed = _in_order(token_axes - set(split) - alone, mesh)
        size = row.size * _copies(row, specs[row.path], rules, mesh)
        used = size / _ways(set(split) - set(gathered), mesh)
        sharded += size / _ways(set(split), mesh)
        if not row.is_frozen:
            trained += size / _ways(set(split), mesh)
        if mesh.stage > 1 and "stage" not in split:
            unstaged += size / _ways(set(split), mesh)
        used_bytes = used * width[row.path]
        served_kept += size / _ways(set(split), mesh) * width[row.path]
        if gathered:
            gathers[gathered] = gathers.get(gathered, 0.0) + used
            served_gathers[gathered] = served_gathers.get(gathered, 0.0) + used_bytes
        if summed and not row.is_frozen:
            part = used / _ways(set(gathered), mesh)
            sums[summed] = sums.get(summed, 0.0) + part
        if "layers" in row.axes:
            at = row.axes.index("layers")
            stages = _ways(set(mesh_axes_in(specs[row.path][at : at + 1])), mesh)
            gathered_layer += used * stages / row.shape[at]
            served_layer += used_bytes * stages / row.shape[at]
            is_layer_gathered |= bool(gathered)
        else:
            gathered_rest = max(gathered_rest, used)
    return Layout(
        mesh=mesh,
        specs=specs,
        batch_ways=_ways(batch_axes, mesh),
        token_ways=_ways(token_axes, mesh),
        residual_ways=residual_ways,
        width_ways=_width_ways(width_axes, rules, sizes, mesh),
        width_axes=width_axes,
        sharded=sharded,
        trained=trained,
        unstaged=unstaged,
        gathers=gathers,
        sums=sums,
        gathered_layer=gathered_layer,
        is_layer_gathered=is_layer_gathered,
        gathered_rest=gathered_rest,
        served=Served(kept=served_kept, gathers=served_gathers, layer=served_layer),
    )


def _residual_ways(rules: Rules, workload: Workload, mesh: MeshShape) -> int:
    """Ways that a device's tokens are split between blocks, beside along `seq`."""
    tokens = workload.seq_len
    seq = _axes_of(rules, "seq", tokens, mesh)
    ways = _ways(seq, mesh)
    if workload.phase == "train" and ways > 1 and tokens // ways % 2:
        half = 1 if tokens % 2 else tokens // 2
        near = nearest_text(_in_order(seq, mesh), half, ways, False, mesh.num_devices)
        raise RuleError(
            f"seq = {tokens} is not divisible by 2 x {ways}; {near} (each part of a "
            "sequence is a piece of its first half and one of its second)"
        )
    residual = _axes_of(rules, "residual", tokens, mesh)
    shared = _in_order({*seq, *residual, "stage"}, mesh)
    if workload.phase == "train" and tokens % _ways(set(shared), mesh):
        over = " x ".join(f"{axis}={mesh.sizes[axis]}" for axis in shared)
        ways = _ways(set(shared), mesh)
        near = nearest_text(shared, tokens, ways, False, mesh.num_devices)
        raise RuleError(
            f"seq = {tokens} is not divisible by {over}; {near} (stages share the loss "
            "by tokens)"
        )
    return _ways(residual - seq, mesh)


def _width_axes(rules: Rules, sizes: Sizes, mesh: MeshShape) -> dict[str, Group]:
    widths = {
        "heads": sizes.heads,
        "kv_heads": sizes.kv_heads,
        "ffn": sizes.ffn,
        "vocab": sizes.vocab,
        "embed": sizes.embed,
    }
    return {
        name: mesh_axes_in(resolve_activation(rules, (name,), (size,), mesh))
        if name in rules.activations
        else ()
        for name, size in widths.items()
    }


def _width_ways(
    width_axes: dict[str, Group], rules: Rules, sizes: Sizes, mesh: MeshShape
) -> dict[str, int]:
    """Ways of each width; one that is repeated has as many as it has parts."""
    ways = {name: _ways(set(axes), mesh) for name, axes in width_axes.items()}
    parts = {"heads": sizes.heads, "kv_heads": sizes.kv_heads}
    return {
        name: min(count, parts[name])
        if name in rules.repeat and name in parts
        else count
        for name, count in ways.items()
    }


def _copies(row: ParamRow, spec: Spec, rules: Rules, mesh: MeshShape) -> float:
    """Devices that hold the same part of a row, because its rule repeats an axis."""
    copies = 1.0
    for axis, size, entry in zip(row.axes, row.shape, spec, strict=True):
        if axis in rules.repeat:
            copies *= max(1.0, _ways(set(mesh_axes_in((entry,))), mesh) / size)
    return copies


def _axes_of(rules: Rules, name: str, size: int, mesh: MeshShape) -> set[str]:
    if name not in rules.activations:
        return set()
    return set(mesh_axes_in(resolve_activation(rules, (name,), (size,), mesh)))


def _expert_axes(row: ParamRow, spec: Spec) -> Group:
    """Mesh axes over which a weight's experts are spread: tokens travel, not it."""
    if "experts" not in row.axes:
        return ()
    at = row.axes.index("experts")
    return mesh_axes_in(spec[at : at + 1])


def _in_order(axes: set[str], mesh: MeshShape) -> Group:
    return tuple(axis for axis in mesh.sizes if axis in axes)


def _ways(axes: set[str], mesh: MeshShape) -> int:
    return math.prod(mesh.sizes[axis] for axis in axes)
