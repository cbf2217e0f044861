"""Turn a program's collectives and its plan into those that were not meant.

Weights split over batch axes are gathered one layer at a time, and their gradients
scattered back; gradients are summed over the axes that do not split their weight; axes
that split a width sum, gather or scatter activations; a lookup in a split table may
exchange tokens; context, expert and stage axes exchange what their names say. Where a
step samples, logits change places, so that each device has whole rows. Between slices
gradient sums travel, and activations from stage to stage. Everything else is unplanned,
with one sentence each.

Sizes decide: an array is a weight's, a gradient's or an activation's if it has exactly
as many elements. Nothing is waved through because it could be something else.

Known lies: a program that decodes loops over steps for as long as anyone waits for a
token; what is in a loop of unknown length is counted once there. An activation that
happens to have as many elements as a planned weight passes for it, within the planned
total. A sum of which a device reads only its own slice is taken for a scatter: XLA:CPU
makes no other, nor does libtpu for some groups; how it travels cannot be read off the
HLO.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llmos_jax.ir import Plan
from llmos_jax.lowering.collectives import Collective
from llmos_jax.lowering.hlo import Array
from llmos_jax.lowering.meaning import Meaning
from llmos_jax.units import format_bytes

SLACK = 1.25
"""What all gathers of a step may move, over what the plan counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unplanned:
    """A collective that the plan does not mean, and one sentence that says why."""

    collective: Collective
    why: str

    def to_json(self) -> dict[str, Any]:
        """One row of `unplanned_collectives`; `bytes` is the total of a step."""
        item = self.collective
        return {
            "op": item.op,
            "axes": list(item.axes),
            "link": item.link,
            "count": item.count,
            "bytes": item.total_bytes,
            "where": item.where,
            "why": self.why,
        }


def audit(collectives: Iterable[Collective], plan: Plan) -> tuple[Unplanned, ...]:
    """Return the collectives that `plan` does not mean, the largest total first.

    Args:
        collectives: what `collectives_of` found in the plan's compiled program.
        plan: what the program was lowered from.
    """
    meant, found = Meaning(plan), list(collectives)
    unplanned = []
    for item in found:
        reasons = (rule(item, meant) for rule in RULES if not meant.is_small(item))
        why = next((reason for reason in reasons if reason), None)
        if why is None and not meant.loops_over_steps:
            why = _unknown_loop(item)
        if why is not None:
            unplanned.append(Unplanned(collective=item, why=why))
    told = {id(one.collective) for one in unplanned}
    rest = [item for item in found if id(item) not in told]
    unplanned.extend(_gathered_too_often(rest, meant))
    return tuple(
        sorted(unplanned, key=lambda one: one.collective.total_bytes, reverse=True)
    )


def _named(axes: Iterable[str]) -> str:
    return " and ".join(axes)


def _size(array: Array) -> str:
    dims = ",".join(map(str, array.dims))
    return f"{array.dtype}[{dims}] ({format_bytes(array.bytes)})"


def _idle_axis(item: Collective, meant: Meaning) -> str | None:
    """Nothing is split over an axis, so nothing needs to travel along it."""
    idle = [axis for axis in item.axes if axis not in meant.active]
    if not idle:
        return None
    return f"the plan splits nothing over {_named(idle)}."


def _crosses_slices(item: Collective, meant: Meaning) -> str | None:
    """Between slices, only sums of gradients are worth their time."""
    if item.link == "ici":
        return None
    axes = frozenset(item.axes)
    if axes and axes <= meant.stage:
        return None  # the rules below see what goes from stage to stage
    if item.op not in ("all-reduce", "reduce-scatter"):
        return f"{item.op} between slices: only sums of gradients are meant for DCN."
    if axes & meant.width:
        return f"activations are summed over {_named(item.axes)} between slices."
    for array in item.arrays:
        if not meant.is_slice_part(array, axes):
            return (
                f"{_size(array)} is summed over {_named(item.axes)} between slices, "
                "and no weight has a gradient of this size."
            )
    return None


def _whole_stack(item: Collective, meant: Meaning) -> str | None:
    """Layers are gathered one by one."""
    axes = frozenset(item.axes)
    if item.op != "all-gather":
        return None
    for array in item.arrays:
        weight = meant.stacked(array)
        if not axes & meant.batch and meant.has_activation_dims(array):
            continue
        if weight is not None and not meant.is_weight_gather(array, axes):
            return (
                f"all {weight.layers} layers of {weight.path} are gathered at once: "
                f"{_size(array)}."
            )
    return None


def _gather_over_batch(item: Collective, meant: Meaning) -> str | None:
    """Over batch axes, weights that are split there are gathered, and no more."""
    axes = frozenset(item.axes)
    if item.op != "all-gather" or not axes & meant.batch:
        return None
    for array in item.arrays:
        if meant.is_weight_gather(array, axes):
            continue
        if meant.plan.topology.slices > 1 and meant.is_slice_part(array, axes):
            continue
        if not axes & meant.gathered:
            reason = f"no weight is split over {_named(item.axes)}"
        else:
            reason = f"no weight gathered over {_named(item.axes)} has this size"
        return f"{_size(array)} is gathered, and {reason}."
    return None


def _gather_over_width(item: Collective, meant: Meaning) -> str | None:
    """Over axes that split a width, activations are gathered; weights stay split."""
    axes = frozenset(item.axes)
    if item.op != "all-gather" or axes & meant.batch:
        return None
    for array in item.arrays:
        weight = meant.weight_like(array)
        if meant.has_activation_dims(array) or array.elements == meant.logits:
            continue
        if weight is not None and not axes & (meant.sequence | meant.expert):
            return (
                f"{weight.path}, which the plan uses in parts, is gathered over "
                f"{_named(item.axes)}: {_size(array)}."
            )
        if not meant.is_activation(array):
            return (
                f"{_size(array)} is gathered over {_named(item.axes)}, and no "
                "activation has this size."
            )
    return None


def _sum_where_scatter_belongs(item: Collective, meant: Meaning) -> str | None:
    """A gradient whose weight is split over an axis is scattered there, not summed."""
    axes = frozenset(item.axes)
    if item.op != "all-reduce" or not axes & meant.gathered:
        return None
    for array, is_scatter in zip(item.arrays, meant.scatters(item), strict=True):
        if is_scatter or meant.is_gradient(array, axes, False):
            continue
        split = axes & meant.gathered
        if any(meant.is_gradient(array, part, True) for part in (axes, split)):
            return (
                f"a gradient of {_size(array)} is summed whole over "
                f"{_named(item.axes)}: its weight is split over {_named(split)}, where "
                "a reduce-scatter takes half the time."
            )
    return None


def _sum_over_batch(item: Collective, meant: Meaning) -> str | None:
    """Over batch axes, gradients are summed, and no activations."""
    axes = frozenset(item.axes)
    if item.op != "all-reduce" or not axes & meant.batch or item.link == "dcn":
        return None
    for array, is_scatter in zip(item.arrays, meant.scatters(item), strict=True):
        if array.bytes < meant.small_bytes or meant.is_gradient(array, axes, False):
            continue
        if is_scatter and meant.is_gradient(array, axes & meant.gathered, True):
            continue
        return (
            f"{_size(array)} is summed over {_named(item.axes)}, and no weight that "
            "is not split there has a gradient of this size."
        )
    return None


def _sum_over_width(item: Collective, meant: Meaning) -> str | None:
    """Over axes that split a width, activations are summed."""
    axes = frozenset(item.axes)
    if item.op != "all-reduce" or axes & meant.batch:
        return None
    if item.link == "dcn" and not axes <= meant.stage:
        return None
    for array in item.arrays:
        fits = meant.is_activation(array) or meant.is_gradient(array, axes, False)
        if not fits and array.bytes >= meant.small_bytes:
            return (
                f"{_size(array)} is summed over {_named(item.axes)}, and no activation "
                "has this size."
            )
    return None


def _scatter(item: Collective, meant: Meaning) -> str | None:
    """Gradients are scattered over the axes that split their weight."""
    axes = frozenset(item.axes)
    if item.op != "reduce-scatter":
        return None
    if item.link == "dcn" and not axes <= meant.stage:
        return None
    for array in item.arrays:
        if array.bytes < meant.small_bytes:
            continue
        if axes & meant.batch:
            fits = meant.is_gradient(array, axes, True)
            fits = fits or meant.is_padded_gradient(array, axes)
            fits = fits or (
                meant.plan.topology.slices > 1 and meant.is_slice_part(array, axes)
            )
        else:
            fits = meant.is_activation(array)
        if not fits:
            return (
                f"{_size(array)} is scattered over {_named(item.axes)}, and the plan "
                "scatters nothing of this size there."
            )
    return None


def _permute(item: Collective, meant: Meaning) -> str | None:
    """Neighbours pass on stages, contexts, or pieces of a gather next to a matmul."""
    axes = frozenset(item.axes)
    if item.op != "collective-permute" or axes <= meant.stage | meant.sequence:
        return None
    for array in item.arrays:
        if axes <= meant.gathered:
            fits = any(
                meant.is_weight_gather(
                    Array(array.dtype, (*array.dims, meant.ways(axes), cut)), axes
                )
                for cut in (1, 2)
            )
        else:
            fits = axes <= meant.width and meant.is_activation(array)
        if not fits:
            return (
                f"{_size(array)} changes places over {_named(item.axes)}: a resharding "
                "that the plan does not have."
            )
    return None


def _exchange(item: Collective, meant: Meaning) -> str | None:
    """Tokens are exchanged by experts and contexts, and by a lookup in a split
    table: twice a microbatch, at most four times where it is recomputed. Logits are, to
    be sampled: once a step."""
    if item.op not in ("all-to-all", "ragged-all-to-all", "collective-broadcast"):
        return None
    axes = frozenset(item.axes)
    if item.op != "collective-broadcast" and axes <= meant.expert | meant.sequence:
        return None
    is_lookup = (
        item.op == "all-to-all"
        and axes <= meant.gathered
        and sum(array.elements for array in item.arrays) <= meant.tokens * meant.embed
        and item.count <= 4 * meant.ticks
    )
    exchanged = sum(array.elements for array in item.arrays) * meant.ways(axes)
    is_logits = axes <= meant.width and exchanged == meant.logits and item.count == 1
    if is_lookup or is_logits:
        return None
    return (
        f"{item.op} of {format_bytes(item.bytes)} over {_named(item.axes)}: the plan "
        "exchanges nothing there."
    )


def _unknown_loop(item: Collective) -> str | None:
    if item.is_count_known:
        return None
    return "it runs in a loop whose length the program does not say: count it by hand."


Rule = Callable[[Collective, Meaning], str | None]

RULES: tuple[Rule, ...] = (
    _idle_axis,
    _crosses_slices,
    _whole_stack,
    _gather_over_batch,
    _gather_over_width,
    _sum_where_scatter_belongs,
    _sum_over_batch,
    _sum_over_width,
    _scatter,
    _permute,
    _exchange,
)
"""Every rule sees every collective that is not small; the first that objects speaks."""


def _gathered_too_often(items: list[Collective], meant: Meaning) -> Iterator[Unplanned]:
    """All gathers of a step, against the weights it needs: forward, once more where
    recomputed (twice in a 1f1b pipeline), backward; and as permutes also the gradients'
    way back."""
    moving = [
        item
        for item in items
        if item.op in ("all-gather", "collective-permute")
        and frozenset(item.axes) <= meant.gathered
        and item.axes
        and not meant.is_small(item)
    ]
    if not moving:
        return
    moved = sum(
        item.count * sum(array.elements for array in item.arrays) for item in moving
    )
    weights = sum(
        weight.elements * weight.layers * (1 if weight.layers > 1 else 2)
        for weight in meant.weights
        if weight.gathered
    )
    passes = 4 if meant.plan.workload.phase == "train" else 1
    passes += meant.plan.way.schedule == "1f1b"
    limit = SLACK * passes * weights * meant.passes
    if moved > limit:
        largest = max(moving, key=lambda item: item.total_bytes)
        why = (
            f"all gathers over {_named(largest.axes)} together move {moved:.3g} "
            f"values a step, and the plan's weights need at most {limit:.3g}."
        )
        yield Unplanned(collective=largest, why=why)
