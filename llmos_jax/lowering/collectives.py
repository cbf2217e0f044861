"""Turn a compiled program's HLO into its collectives: over which mesh axes, how large.

Forms that are read, as XLA prints them (jax 0.10.2 and 0.12, CPU, v5e, v5p, v6e):

| form | counted as |
|---|---|
| `all-gather`, `all-gather-start`, ... | itself, once; `-done` is not counted |
| AsyncCollectiveStart fusion, its steps, AsyncCollectiveDone | one, where it starts |
| kCustom fusion of an all-reduce and dynamic-slices of it | one reduce-scatter |
| all-reduce of zeros into which a device wrote its own part (v5p) | one all-gather |
| ring of `collective-permute`s in a windowed dot_general loop | its permutes |
| `send` and `recv` of the megascale runtime (several slices) | one, over DCN |

Groups name positions in the program's device assignment, which is `mesh.devices` in
flattened order. On several TPU slices one slice's devices run the program: positions
count within a slice, and what crosses slices names device ids.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from llmos_jax.errors import LowerError
from llmos_jax.lowering.groups import Groups, parse_dcn_groups, parse_groups
from llmos_jax.lowering.hlo import (
    Array,
    Computation,
    Instruction,
    Module,
    Times,
    arrays_of,
    parse_hlo,
)

Link = Literal["ici", "dcn"]

OPS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One collective of a program.

    `bytes` is the payload of one execution, per device: the whole array that the group
    shares. For a gather that is its result, for a reduce-scatter its operand, for a sum
    the array summed, for an all-to-all and a permute what one device holds. A combined
    (tuple) collective counts all its arrays. Bytes on the wire follow from it: a ring
    of n devices sends (n - 1)/n of it for a gather, twice that for a sum.
    """

    op: str
    axes: tuple[str, ...]
    """Mesh axes along which the devices of a group differ, in mesh order."""
    link: Link
    count: int
    """Executions per step, loops multiplied out."""
    bytes: int
    where: str
    """`op_name`, and file:line where XLA kept it."""
    arrays: tuple[Array, ...] = ()
    sliced: tuple[bool, ...] = ()
    """Of a sum: whether a device reads only its own slice of each array. Fused, that
    is a reduce-scatter; not fused, a sum where one would do."""
    is_count_known: bool = True
    """False inside a loop whose length the program does not say."""

    @property
    def total_bytes(self) -> int:
        """Payload of all executions of one step, per device."""
        return self.bytes * self.count


def collectives_of(
    text: str, mesh: Mesh, slice_index: Sequence[int] | None = None
) -> tuple[Collective, ...]:
    """Return every collective of a program, one per instruction, largest total first.

    Args:
        text: `compiled.as_text()`.
        mesh: the mesh it was compiled for, of real or compile-only devices.
        slice_index: slice of each device in `mesh.devices.flat`; None asks the devices.

    Raises:
        LowerError: the program runs on another number of devices than the mesh has.
    """
    module = parse_hlo(text)
    places = _Places(mesh, slice_index, module.partitions)
    fused = _fused(module)
    started, callers = set(_started(module)), _callers(module)
    found: list[Collective] = []
    for name, times in module.runs().items():
        computation = module.computations[name]
        for line in computation.instructions.values():
            if name in fused and _continues(computation, line, started):
                continue
            made = _collective(
                module, computation, line, times, places, callers, name in fused
            )
            if made is not None and made.axes:
                own = _own_parts(module, computation, line, made)
                found.extend(_apart(made, own))
    return tuple(sorted(found, key=lambda item: item.total_bytes, reverse=True))


def table(collectives: Iterable[Collective]) -> list[dict[str, Any]]:
    """Rows for people and JSON, by op, axes and link: the largest total first.

    `count` is executions per step, `bytes` their payload together, per device; `where`
    names the largest.
    """
    rows: dict[tuple[str, tuple[str, ...], str], dict[str, Any]] = {}
    for item in sorted(collectives, key=lambda item: item.total_bytes, reverse=True):
        row = rows.setdefault(
            (item.op, item.axes, item.link),
            {
                "op": item.op,
                "axes": list(item.axes),
                "link": item.link,
                "count": 0,
                "bytes": 0,
                "where": item.where,
            },
        )
        row["count"] += item.count
        row["bytes"] += item.total_bytes
    return sorted(rows.values(), key=lambda row: row["bytes"], reverse=True)


class _Places:
    """Where the devices that a program's groups name stand on the mesh."""

    def __init__(
        self, mesh: Mesh, slice_index: Sequence[int] | None, partitions: int
    ) -> None:
        devices = list(mesh.devices.flat)
        self.axes, self.shape = mesh.axis_names, mesh.devices.shape
        if slice_index is None:
            slice_index = [getattr(device, "slice_index", 0) or 0 for device in devices]
        self.slice_of = list(slice_index)
        self.position = {device.id: place for place, device in enumerate(devices)}
        slices = sorted(set(self.slice_of))
        self.programs = [list(range(len(devices)))]
        if partitions != len(devices):
            self.programs = [
                [place for place, at in enumerate(self.slice_of) if at == one]
                for one in slices
            ]
        if any(len(program) != partitions for program in self.programs):
            raise LowerError(
                f"the program runs on {partitions} devices, and the mesh has "
                f"{len(devices)} in {len(slices)} slices. Audit a program with the "
                "mesh it was compiled for."
            )

    @property
    def group_size(self) -> int:
        """Devices that a program numbers."""
        return len(self.programs[0])

    def on_mesh(self, groups: Groups) -> Groups:
        """Groups of positions in a program, as positions on the mesh."""
        return tuple(
            tuple(program[member] for member in group)
            for program in self.programs
            for group in groups
        )

    def by_id(self, groups: Groups) -> Groups:
        """Groups of device ids, as positions on the mesh.

        Raises:
            LowerError: a device that the mesh lacks.
        """
        unknown = {one for group in groups for one in group} - self.position.keys()
        if unknown:
            raise LowerError(
                f"the program sends to device {min(unknown)}, which the mesh lacks. "
                "Audit a program with the mesh it was compiled for."
            )
        return tuple(tuple(self.position[one] for one in group) for group in groups)

    def spanned(self, groups: Groups) -> tuple[tuple[str, ...], Link]:
        """The mesh axes along which members of a group differ, and the link."""
        differs = np.zeros(len(self.axes), bool)
        crosses = False
        for group in groups:
            at = np.stack(np.unravel_index(np.array(group), self.shape))
            differs |= np.any(at != at[:, :1], axis=1)
            crosses |= len({self.slice_of[member] for member in group}) > 1
        axes = tuple(axis for axis, does in zip(self.axes, differs) if does)
        return axes, "dcn" if crosses else "ici"


def _collective(
    module: Module,
    computation: Computation,
    line: Instruction,
    times: Times,
    places: _Places,
    callers: dict[str, str],
    is_fused: bool,
) -> Collective | None:
    if line.opcode == "send" and "_xla_megascale_target" in line.attributes:
        op = _dcn_op(line)
        groups = places.by_id(parse_dcn_groups(line))
        arrays = _dcn_arrays(computation, line)
    else:
        op = line.opcode.removesuffix("-start")
        if op not in OPS:
            return None
        groups = places.on_mesh(parse_groups(line, places.group_size))
        arrays = _payload(computation, line, op)
    sliced: tuple[bool, ...] = ()
    if op == "all-reduce" and line.opcode != "send":
        sliced = _read_in_part(module, computation, line)
        if is_fused and all(sliced):
            op = "reduce-scatter"
    axes, link = places.spanned(groups)
    return Collective(
        op=op,
        axes=axes,
        link=link,
        count=times.count,
        bytes=sum(array.bytes for array in arrays),
        where=_where(module, computation, line, callers),
        arrays=arrays,
        sliced=sliced,
        is_count_known=times.is_known,
    )


def _own_parts(
    module: Module, computation: Computation, line: Instruction, made: Collective
) -> tuple[bool, ...]:
    """Which arrays of a sum are zero but for what a device wrote into its own part."""
    if made.op != "all-reduce" or line.opcode == "send":
        return (False,) * len(made.arrays)
    return tuple(_is_own_part(module, computation, name) for name in line.operands)


def _apart(made: Collective, own: tuple[bool, ...]) -> Iterator[Collective]:
    """A sum whose arrays are own parts is a gather of those; libtpu may sum both in
    one."""
    if not any(own):
        yield made
        return
    for op, is_own in (("all-gather", True), ("all-reduce", False)):
        at = [index for index, one in enumerate(own) if one == is_own]
        if at:
            arrays = tuple(made.arrays[index] for index in at)
            yield replace(
                made,
                op=op,
                arrays=arrays,
                bytes=sum(array.bytes for array in arrays),
                sliced=() if is_own else tuple(made.sliced[index] for index in at),
            )


def _payload(computation: Computation, line: Instruction, op: str) -> tuple[Array, ...]:
    if op == "reduce-scatter":
        operands = (computation.instructions[name] for name in line.operands)
        return tuple(array for operand in operands for array in operand.arrays)
    if line.opcode.endswith("-start") and op != "all-reduce":
        return arrays_of(line.halves[1])
    return line.arrays


_DCN_OPS = {
    "ALL_GATHER": "all-gather",
    "ALL_REDUCE": "all-reduce",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
"""What the megascale runtime of libtpu 0.0.42 and 0.0.50 calls its transfers."""


def _dcn_op(line: Instruction) -> str:
    said = re.search(r'_xla_megascale_transfer_type="(\w+)"', line.attributes)
    name = said.group(1) if said else "a transfer without a type"
    if name not in _DCN_OPS:
        raise LowerError(
            f"{line.name} sends {name} between slices, which the audit does not know. "
            f"It knows {', '.join(_DCN_OPS)}."
        )
    return _DCN_OPS[name]


def _dcn_arrays(computation: Computation, send: Instruction) -> tuple[Array, ...]:
    """What is sent or what is received, whichever is larger: the whole array."""
    key = _rendezvous(send)
    ends = [
        arrays_of(line.halves[0])
        for line in computation.instructions.values()
        if line.opcode in ("send", "recv") and _rendezvous(line) == key
    ]
    return max(ends, key=lambda arrays: sum(array.bytes for array in arrays))


def _rendezvous(line: Instruction) -> str | None:
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', line.attributes)
    return found.group(1) if found else None


def _fused(module: Module) -> set[str]:
    """Computations that are the inside of a fusion."""
    return {
        name
        for computation in module.computations.values()
        for line in computation.instructions.values()
        if line.opcode == "fusion"
        for name in line.calls("calls")
    }


def _started(module: Module) -> Iterator[tuple[str, str | None, str]]:
    """Identities of the collectives that an AsyncCollectiveStart begins."""
    for computation in module.computations.values():
        for line in computation.instructions.values():
            if _is_start(line):
                for name in line.operands:
                    yield _identity(computation.instructions[name])


def _is_start(line: Instruction) -> bool:
    return '"AsyncCollectiveStart"' in line.attributes


def _identity(line: Instruction) -> tuple[str, str | None, str]:
    shape = ",".join(str(array) for array in line.arrays)
    return line.opcode, line.attribute("channel_id"), shape


def _continues(
    computation: Computation,
    line: Instruction,
    started: set[tuple[str, str | None, str]],
) -> bool:
    """Whether a fused collective is a later step of one that started elsewhere."""
    if line.opcode not in OPS or _identity(line) not in started:
        return False
    return not any(_is_start(user) for user in computation.users(line.name))


def _read_in_part(
    module: Module, computation: Computation, line: Instruction
) -> tuple[bool, ...]:
    """For each array of a result, whether only dynamic-slices of it are read."""
    if len(line.arrays) == 1 and not line.shape.startswith("("):
        return (_is_sliced(module, computation, line.name),)
    users = computation.users(line.name)
    if any(user.opcode != "get-tuple-element" for user in users):
        return (False,) * len(line.arrays)
    sliced = [True] * len(line.arrays)
    for user in users:
        index = int(user.attribute("index") or 0)
        sliced[index] &= _is_sliced(module, computation, user.name)
    return tuple(sliced)


def _is_sliced(module: Module, computation: Computation, name: str) -> bool:
    users = computation.users(name)
    return bool(users) and all(
        _reads_slice(module, computation, user, name) for user in users
    )


def _reads_slice(
    module: Module, computation: Computation, user: Instruction, name: str
) -> bool:
    if user.opcode == "dynamic-slice":
        return user.operands[0] == name
    if user.opcode in _VIEWS and not user.is_root:
        return _is_sliced(module, computation, user.name)
    if user.opcode not in ("fusion", "call"):
        return False
    inner = module.computations[user.calls("calls", "to_apply")[0]]
    if all(
        line.opcode in (*_VIEWS, "parameter") for line in inner.instructions.values()
    ):
        return _is_sliced(module, computation, user.name)
    places = [str(n) for n, operand in enumerate(user.operands) if operand == name]
    return all(
        _is_sliced(module, inner, line.name)
        for line in inner.instructions.values()
        if line.opcode == "parameter" and line.inside in places
    )


def _is_own_part(module: Module, computation: Computation, name: str) -> bool:
    """Whether an array is zero but for a slice that was written into it."""
    line = computation.instructions[name]
    if line.opcode in _VIEWS:
        return _is_own_part(module, computation, line.operands[0])
    if line.opcode == "dynamic-update-slice":
        return _is_zero(computation, line.operands[0])
    if line.opcode != "fusion":
        return False
    inner = module.computations[line.calls("calls")[0]]
    root = inner.root
    while root.opcode in _VIEWS:
        root = inner.instructions[root.operands[0]]
    if root.opcode != "dynamic-update-slice":
        return False
    base = inner.instructions[root.operands[0]]
    if base.opcode == "parameter":
        return _is_zero(computation, line.operands[int(base.inside)])
    return _is_zero(inner, base.name)


def _is_zero(computation: Computation, name: str) -> bool:
    line = computation.instructions[name]
    if line.opcode in (*_VIEWS, "broadcast"):
        return _is_zero(computation, line.operands[0])
    return line.opcode == "constant" and line.inside.strip() in ("0", "-0")


_VIEWS = ("bitcast", "copy", "convert", "reshape", "transpose")


def _callers(module: Module) -> dict[str, str]:
    """Computation -> what the instruction that runs it says of its source."""
    return {
        name: module.source(line)
        for computation in module.computations.values()
        for line in computation.instructions.values()
        for name in line.calls("calls", "body", "branch_computations")
    }


def _where(
    module: Module, computation: Computation, line: Instruction, callers: dict[str, str]
) -> str:
    """The source of an instruction, else of one that it reads or that reads it.

    What libtpu splits between slices has lost its own.
    """
    read = [computation.instructions[name] for name in line.operands]
    near = [line, *computation.users(line.name), *read]
    said = (module.source(one) for one in near)
    return next(filter(None, said), callers.get(computation.name) or line.name)
