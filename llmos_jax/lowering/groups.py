"""Turn the groups that an HLO collective names into tuples of device numbers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from llmos_jax.lowering.hlo import Instruction

Groups = tuple[tuple[int, ...], ...]

_SLICE_IDS = 100_000
"""Device ids of slice n, counted from 1, begin at n times this (same libtpu)."""


def parse_groups(line: Instruction, num_devices: int) -> Groups:
    """The groups of an instruction: positions in the program's device assignment.

    Four forms: `{{0,1},{2,3}}`; iota `[2,2]<=[2,2]T(1,0)`; a mesh and its axes
    `mesh['a'=2,'b'=2] {'b'}`; and `source_target_pairs`, whose pairs are groups.
    """
    text = line.attribute("source_target_pairs") or _group_text(line)
    if text.startswith("mesh"):
        return _mesh_groups(text)
    if text.startswith("["):
        return _tuples(_iota(text))
    listed = re.findall(r"\{([\d,]+)\}", text)
    if not listed:
        return (tuple(range(num_devices)),)
    return tuple(tuple(int(one) for one in group.split(",")) for group in listed)


def _group_text(line: Instruction) -> str:
    """`replica_groups=`, of which the mesh form goes on past commas."""
    start = line.attributes.find("replica_groups=")
    if start < 0:
        return ""
    rest = line.attributes[start + len("replica_groups=") :]
    form = re.match(r"mesh\[[^\]]*\](?:, device_ids=\(.*?\))? ?\{[^}]*\}", rest)
    return form.group() if form else (line.attribute("replica_groups") or "")


def _iota(text: str) -> np.ndarray:
    """`[4,2]<=[2,2,2]T(2,1,0)` as the array it stands for."""
    found = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    assert found is not None, text
    shape, source, order = (
        None if part is None else [int(one) for one in part.split(",")]
        for part in found.groups()
    )
    assert shape is not None
    source = source or shape
    values = np.arange(int(np.prod(source))).reshape(source)
    return (values.transpose(order) if order else values).reshape(shape)


def _mesh_groups(text: str) -> Groups:
    """`mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}` as groups.

    A group may span a part of an axis: `'b':(2)2` is the part of size 2 that comes
    after a major part of size 2.
    """
    head, _, tail = text.rpartition("{")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", head)}
    parts: dict[str, list[tuple[int, int]]] = {name: [] for name in sizes}
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", tail):
        parts[name].append((int(before or 1), int(size or sizes[name])))
    dims = [dim for name in sizes for dim in _cut(sizes[name], parts[name])]
    order = re.search(r"device_ids=\((.*)\)", head)
    flat = _iota(order.group(1)).reshape(-1) if order else np.arange(_product(sizes))
    members = [place for place, (_, is_member) in enumerate(dims) if is_member]
    rest = [place for place, (_, is_member) in enumerate(dims) if not is_member]
    grid = flat.reshape([size for size, _ in dims]).transpose(rest + members)
    return _tuples(grid.reshape(_product({p: dims[p][0] for p in rest}), -1))


def _cut(size: int, parts: list[tuple[int, int]]) -> list[tuple[int, bool]]:
    """Cut an axis into (size, whether groups span it), major first."""
    dims, done = [], 1
    for before, part in sorted(parts):
        dims += [(before // done, False), (part, True)]
        done = before * part
    return [*dims, (size // done, False)]


def _product(sizes: dict[Any, int]) -> int:
    return int(np.prod(list(sizes.values()), dtype=int))


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(one) for one in group) for group in groups)


def parse_dcn_groups(line: Instruction) -> Groups:
    """Device ids: `"{1,2}x{0:7}"` (slices x devices of a slice), lists, or pairs."""
    text = (line.attribute("_xla_megascale_target") or "").strip('"')
    slices, product, inside = text.partition("x")
    if not product:
        groups = re.findall(r"\{([\d,>\-]+)\}", text)
        return tuple(tuple(int(n) for n in re.findall(r"\d+", one)) for one in groups)
    return tuple(
        tuple(number * _SLICE_IDS + member for number in group)
        for group in _ranges(slices)
        for member in _ranges(inside)[0]
    )


def _ranges(text: str) -> list[list[int]]:
    """`{1,2}` or `{0:7}` (both ends count) as numbers; one list per brace."""
    found = []
    for inner in re.findall(r"\{([\d,:]+)\}", text):
        numbers: list[int] = []
        for word in inner.split(","):
            first, _, last = word.partition(":")
            numbers += range(int(first), int(last or first) + 1)
        found.append(numbers)
    return found
