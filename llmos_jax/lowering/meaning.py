"""Turn a plan into what it means for a program: roles of axes, sizes of arrays.

The batch axes are those that split `batch`. A weight split over a batch axis is
gathered there before use and its gradient scattered back (fsdp); split over another one
it is used in parts (tensor); its gradient is summed over the axes that do not split it
(data). What the audit asks is here: could an array of this size be a gathered weight, a
gradient, an activation?
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from llmos_jax.ir import ParamRow, Plan, mesh_axes_in
from llmos_jax.ir.facts import ticks_of
from llmos_jax.lowering.collectives import Collective
from llmos_jax.lowering.hlo import Array

SMALL_BYTES = 2**20
"""One execution with a smaller payload is small: a judgement; the latency of a TPU
collective (about 10 us, a few hops) costs as much as 1 MiB over one 45 GB/s link."""
SMALL_SHARE = 1e-3
"""... and at most this share of the parameters' bytes, so small models are audited."""
SMALL_FLOOR = 4096
"""... but never less than this many bytes: scalars and norms of the smallest models."""
TILE = 8 * 128
"""Elements of a tile of TPU memory (the T(8,128) of every layout in the HLO)."""

PADDING = 1 / 16
"""Most that a dimension of a scattered gradient was seen to grow by is 1/32: 3072 rows
of llama3_2_3b to 3168, v5p:2x2x2, context=4 fsdp=2. Twice that passes."""

Axes = frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """One weight as a device uses it; `layers` of them are stacked."""

    path: str
    layers: int
    used: tuple[int, ...]
    """Dimensions of one layer's, once gathered over `gathered`."""
    whole: tuple[int, ...]
    """Dimensions of one layer's, split over nothing."""
    gathered: Axes
    split: Axes

    @property
    def elements(self) -> int:
        return math.prod(self.used)


class Meaning:
    """The roles of a plan's mesh axes, and the sizes that it moves along them."""

    def __init__(self, plan: Plan):
        self.plan, self.sizes = plan, plan.mesh.sizes
        activations = plan.rules.activations
        sequence = self._used(activations, "seq", "kv_seq")
        self.batch = self._used(activations, "batch")
        self.expert = self._used(plan.rules.weights, "expert", "experts")
        self.expert |= self._used(activations, "expert", "experts")
        self.sequence = sequence - self.batch
        self.stage = self._used(plan.rules.weights, "layers")
        self.width = (
            self._used(activations, *activations)
            - self.batch
            - self.sequence
            - self.expert
        )
        self.weights = tuple(self._weight(row) for row in plan.params.rows)
        self.weights += self._tiles_of_the_head()
        self.split_weights = frozenset().union(*(w.split for w in self.weights))

    def _used(self, section: dict[str, tuple[str, ...]], *names: str) -> Axes:
        axes = (axis for name in names for axis in section.get(name, ()))
        return frozenset(axis for axis in axes if self.sizes[axis] > 1)

    def _weight(self, row: ParamRow) -> Weight:
        used, whole, layers = [], [], 1
        split: set[str] = set()
        for axis, size, entry in zip(
            row.axes, row.shape, self.plan.specs[row.path], strict=True
        ):
            names = [name for name in mesh_axes_in((entry,)) if self.sizes[name] > 1]
            part = size // self.ways(set(names) - self.batch)
            split.update(names)
            if axis == "layers":
                layers = part
                continue
            used.append(part)
            whole.append(size)
        return Weight(
            path=row.path,
            layers=layers,
            used=tuple(used),
            whole=tuple(whole),
            gathered=frozenset(split) & self.batch,
            split=frozenset(split),
        )

    def _tiles_of_the_head(self) -> tuple[Weight, ...]:
        """The head as the loss gathers it where it is cut along the vocabulary."""
        way = self.plan.way
        if way.loss_over != "vocab" or way.loss_tiles == 1:
            return ()
        heads = [
            (weight, row)
            for weight, row in zip(self.weights, self.plan.params.rows, strict=True)
            if "vocab" in row.axes and len(row.axes) == 2
        ]
        tiles = []
        for weight, row in heads:
            at = row.axes.index("vocab")
            v, rest = weight.used[at], weight.used[1 - at]
            cut = next(d for d in range(way.loss_tiles, v + 1) if v % d == 0)
            tiles.append(
                replace(
                    weight, layers=cut, used=(rest, v // cut), whole=(rest, v // cut)
                )
            )
        return tuple(tiles)

    def ways(self, axes: Iterable[str]) -> int:
        """Devices along mesh axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    @cached_property
    def gathered(self) -> Axes:
        """Axes over which some weight is gathered before use."""
        return frozenset().union(*(weight.gathered for weight in self.weights))

    @cached_property
    def active(self) -> Axes:
        """Axes that the plan gives anything to do."""
        roles = self.batch | self.sequence | self.expert | self.width | self.stage
        return roles | self.split_weights

    @cached_property
    def tokens(self) -> int:
        """Tokens that one device has of a microbatch."""
        ways = self.ways(self.batch | self.sequence) * self.plan.microbatches
        return max(1, self.plan.workload.tokens // ways)

    @cached_property
    def widest(self) -> int:
        """The widest activation of a layer, in values per token."""
        wide = self.plan.params.axis_sizes()
        heads = wide.get("heads", 1) * wide.get("head_dim", 1)
        return max(wide.get("embed", 1), wide.get("ffn", 1), heads)

    @cached_property
    def embed(self) -> int:
        """Values per token between layers."""
        return self.plan.params.axis_sizes().get("embed", self.widest)

    @property
    def loops_over_steps(self) -> bool:
        """Whether the program runs its step as often as it is told to."""
        return self.plan.workload.phase == "decode"

    @cached_property
    def logits(self) -> int | None:
        """Logits that are sampled in a step, of the rows that devices with parts of the
        vocabulary share; None in training, which samples nothing."""
        workload = self.plan.workload
        if workload.phase == "train":
            return None
        rows = workload.global_batch // self.ways(self.batch)
        return rows * self.plan.params.axis_sizes().get("vocab", 1)

    @cached_property
    def small_bytes(self) -> float:
        """Payload below which a collective needs no reason."""
        params = 4 * self.plan.params.num_params
        return min(SMALL_BYTES, max(SMALL_SHARE * params, SMALL_FLOOR))

    def is_small(self, item: Collective) -> bool:
        """Scalars, norms and token ids."""
        tokens = self.plan.workload.tokens
        is_ids = item.link == "ici" and all(
            array.dtype in ("s32", "u32") and array.elements <= tokens
            for array in item.arrays
        )
        return item.bytes < self.small_bytes or is_ids

    @cached_property
    def ticks(self) -> int:
        """Times that a device takes something up in a step, in one direction: each
        microbatch; in a pipeline in every round, and while it fills and drains."""
        return ticks_of(self.plan.way)

    @cached_property
    def passes(self) -> float:
        """Times that all of a device's layers run in a step, in one direction."""
        return self.ticks / self.plan.way.rounds

    def is_activation(self, array: Array) -> bool:
        """Whether an array has the size of some values per local token.

        In a pipeline, the head has its share of all microbatches' tokens at once.
        """
        counts = {self.tokens}
        if self.stage:
            microbatches, stages = self.plan.microbatches, self.ways(self.stage)
            counts.add(max(1, self.tokens * microbatches // stages))
        found = (divmod(array.elements, tokens) for tokens in counts)
        return any(rest == 0 and per_token <= self.widest for per_token, rest in found)

    def has_activation_dims(self, array: Array) -> bool:
        """Whether an array has the dimensions of an activation between layers."""
        workload = self.plan.workload
        rows = workload.global_batch // self.ways(self.batch) // self.plan.microbatches
        return _same_dims(array.dims, (rows, self.tokens // max(1, rows), self.embed))

    def is_weight_gather(self, array: Array, axes: Axes) -> bool:
        """Whether one layer's weight, gathered over `axes`, has this size."""
        return any(
            axes <= weight.gathered
            and array.elements * self.ways(still) == weight.elements
            for weight in self.weights
            for still in _subsets(weight.gathered - axes)
        )

    def is_gradient(self, array: Array, axes: Axes, scattered: bool) -> bool:
        """Whether a gradient summed over `axes` has this size, one layer's or all.

        Args:
            scattered: its weight is split over `axes`; else over none of them.
        """
        return any(
            array.elements * self.ways(done) == weight.elements * layers
            for weight in self.weights
            if (axes <= weight.gathered if scattered else not axes & weight.split)
            for done in _subsets(weight.gathered - axes)
            for layers in {1, weight.layers}
        )

    def is_padded_gradient(self, array: Array, axes: Axes) -> bool:
        """Whether this is one layer's gradient to be scattered over `axes`, with one
        dimension a little longer: libtpu pads what it scatters (3072 to 3168)."""
        dims = Counter(n for n in array.dims if n > 1)
        for weight in self.weights:
            used = Counter(n for n in weight.used if n > 1)
            true, padded = [*(used - dims).elements()], [*(dims - used).elements()]
            if axes <= weight.gathered and len(true) == len(padded) == 1:
                if true[0] <= padded[0] <= true[0] * (1 + PADDING):
                    return True
        return False

    def is_slice_part(self, array: Array, axes: Axes) -> bool:
        """Whether this is (a part of) gradients summed inside slices, then across.

        What crosses is one slice's part of one gradient, or of several in one buffer
        of whole 8 x 128 tiles.
        """
        inside = self.ways(axes) // math.gcd(self.ways(axes), self._slices)
        if self.is_gradient(array, axes, False):
            return True
        return any(
            array.elements in (total, -(-total // TILE) * TILE)
            for level in (False, True)
            for total in self._sums_of_gradients(axes, level, inside)
        )

    def _sums_of_gradients(self, axes: Axes, level: bool, inside: int) -> set[int]:
        """Elements of one or more gradients together: one layer's, or all (`level`)."""
        totals = {0}
        for weight in self.weights:
            if not axes & weight.split:
                elements = weight.elements * (weight.layers if level else 1)
                part = elements // self.ways(weight.gathered) // inside
                totals |= {total + part for total in totals}
        return totals - {0}

    @property
    def _slices(self) -> int:
        return self.plan.topology.slices

    def scatters(self, item: Collective) -> tuple[bool, ...]:
        """For each array of a sum, whether a device reads only its own slice of it.

        Then it is made in a scatter's place: XLA:CPU knows no other, and libtpu makes
        even `jax.lax.psum_scatter` so for some groups (64 chips of v5p). What travels
        is the compiler's business.
        """
        return item.sliced or (False,) * len(item.arrays)

    def stacked(self, array: Array) -> Weight | None:
        """The weight whose layers, all at once, have these dimensions."""
        for weight in self.weights:
            shapes = (weight.used, weight.whole)
            if weight.layers > 1 and any(
                _same_dims(array.dims, (weight.layers, *dims)) for dims in shapes
            ):
                return weight
        return None

    def weight_like(self, array: Array) -> Weight | None:
        """The weight that has these dimensions, in parts or whole."""
        for weight in self.weights:
            if len([dim for dim in weight.whole if dim > 1]) < 2:
                continue
            if any(_same_dims(array.dims, d) for d in (weight.used, weight.whole)):
                return weight
        return None


def _same_dims(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return sorted(n for n in a if n > 1) == sorted(n for n in b if n > 1)


def _subsets(axes: Axes) -> Iterator[tuple[str, ...]]:
    for size in range(len(axes) + 1):
        yield from itertools.combinations(sorted(axes), size)
