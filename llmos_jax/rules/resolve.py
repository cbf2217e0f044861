"""Turn Rules and a mesh into one Spec per array: which mesh axes split which dimension.

Nothing is guessed: a name without a rule, a mesh axis used twice on one array and a
dimension that does not divide are RuleErrors. flax's resolvers let the first become a
mesh axis and the second silently mean "replicate" (flax issue 1702, MaxText PR 4205).
"""

from __future__ import annotations

import math

from llmos_jax.errors import RuleError, did_you_mean
from llmos_jax.ir.params import ParamTable
from llmos_jax.ir.plan import MeshShape
from llmos_jax.ir.rules import Rules, Spec
from llmos_jax.rules.load import load_axes, locate

_BATCH_AXES = frozenset({"batch", "seq", "residual", "kv_seq"})
"""Axes that activations have of their own, without any weight that carries them."""

Axes = tuple[str | None, ...]
Section = dict[str, tuple[str, ...]]


def check_rules(rules: Rules, table: ParamTable) -> None:
    """Raise RuleError unless the rules cover the model's axes, and only those.

    Holds for every mesh: each row's axes are in the vocabulary and have a rule, no mesh
    axis splits one row twice. For a model of a family (one with a spec) no entry is
    without use; a module of one's own may use a part of the family's rules.
    """
    words = load_axes()
    used: set[str] = set()
    for row in table.rows:
        if len(row.axes) != len(row.shape):
            raise RuleError(
                f"{row.path} of model {table.name} has shape {row.shape} but "
                f"{len(row.axes)} logical axes {row.axes}; give one per dimension."
            )
        for axis in row.axes:
            if axis is not None and axis not in words:
                raise RuleError(
                    f"{row.path} of model {table.name} has the unknown logical axis "
                    f"{axis!r}.{did_you_mean(axis, words)} The vocabulary is "
                    "sharding_rules/axes.toml."
                )
        _entries(rules, "weights", rules.weights, row.axes, row.path)
        used.update(axis for axis in row.axes if axis is not None)
    if table.spec is not None:
        _check_unused(rules, "weights", rules.weights, used, table)
        _check_unused(
            rules, "activations", rules.activations, used | _BATCH_AXES, table
        )
    if "batch" not in rules.activations:
        raise RuleError(
            f"{locate(rules.source, 'activations')}: nothing splits the batch; add "
            'batch = ["data"], or batch = [] for one device.'
        )


def resolve(rules: Rules, table: ParamTable, mesh: MeshShape) -> dict[str, Spec]:
    """Return each parameter's path with its Spec on `mesh`.

    A Spec has one entry per dimension; mesh axes of size 1 do not appear.

    Raises:
        RuleError: a missing rule, a collision, or a dimension that does not divide.
    """
    section = rules.weights
    return {
        row.path: _split(rules, "weights", section, row.axes, row.shape, mesh, row.path)
        for row in table.rows
    }


def resolve_activation(
    rules: Rules, axes: Axes, shape: tuple[int, ...], mesh: MeshShape
) -> Spec:
    """Return the Spec of an activation with these logical axes and sizes.

    Raises:
        RuleError: a missing rule, a collision, or a dimension that does not divide.
    """
    if len(axes) != len(shape):
        raise RuleError(f"an activation of shape {shape} has {len(axes)} axes {axes}.")
    section, what = rules.activations, f"activation ({', '.join(map(str, axes))})"
    return _split(rules, "activations", section, axes, shape, mesh, what)


def resolve_weight(
    rules: Rules, axes: Axes, shape: tuple[int, ...], mesh: MeshShape
) -> Spec:
    """Return the Spec of a weight with these logical axes and sizes, as it is stored.

    Raises:
        RuleError: a missing rule, a collision, or a dimension that does not divide.
    """
    what = f"weight ({', '.join(map(str, axes))})"
    return _split(rules, "weights", rules.weights, axes, shape, mesh, what)


def nearest_divisors(size: int, ways: int) -> list[int]:
    """Return the next smaller and the next larger number than `ways` that divide
    `size`, as far as there are any."""
    low = [part for part in range(1, math.isqrt(size) + 1) if size % part == 0]
    parts = {*low, *(size // part for part in low)}
    below = [max((part for part in parts if part < ways), default=0)]
    above = [min((part for part in parts if part > ways), default=0)]
    return [part for part in below + above if part]


def nearest_text(
    axes: tuple[str, ...],
    size: int,
    ways: int,
    may_repeat: bool = False,
    devices: int | None = None,
) -> str:
    """Return the ways nearest to `ways` that divide `size`, in words: `nearest:
    stage=2 or stage=4`.

    Args:
        axes: the mesh axes that split the dimension.
        size: of the dimension.
        ways: that do not divide it.
        may_repeat: whether several devices may hold the same part.
        devices: of the mesh, which the ways must divide too.
    """
    near = nearest_divisors(size if devices is None else math.gcd(size, devices), ways)
    if may_repeat and ways > size:
        near = [ways // size * size, (ways // size + 1) * size]
    if len(axes) == 1:
        return "nearest: " + " or ".join(f"{axes[0]}={part}" for part in near)
    return f"nearest: {' x '.join(axes)} = {' or '.join(map(str, near))}"


def _split(
    rules: Rules,
    name: str,
    section: Section,
    axes: Axes,
    shape: tuple[int, ...],
    mesh: MeshShape,
    what: str,
) -> Spec:
    sizes = mesh.sizes
    spec: list[str | tuple[str, ...] | None] = []
    entries = _entries(rules, name, section, axes, what)
    for axis, size, listed in zip(axes, shape, entries, strict=True):
        active = tuple(part for part in listed if sizes[part] > 1)
        ways = math.prod(sizes[part] for part in active)
        is_repeated = axis in rules.repeat and ways % size == 0
        if size % ways and rules.uneven == "replicate":
            active = ()
        elif size % ways and not is_repeated:
            over = " x ".join(f"{part}={sizes[part]}" for part in active)
            may_repeat = axis in rules.repeat
            near = nearest_text(active, size, ways, may_repeat, mesh.num_devices)
            raise RuleError(
                f"{axis} = {size} is not divisible by {over}; {near} ({what}, "
                f"{locate(rules.source, name, str(axis))})"
            )
        spec.append(active if len(active) > 1 else active[0] if active else None)
    return tuple(spec)


def _entries(
    rules: Rules, name: str, section: Section, axes: Axes, what: str
) -> list[tuple[str, ...]]:
    """The rule of each dimension, checked for presence and for collisions."""
    entries: list[tuple[str, ...]] = []
    owner: dict[str, str] = {}
    for axis in axes:
        if axis is None:
            entries.append(())
            continue
        if axis not in section:
            raise RuleError(
                f"{locate(rules.source, name)}: {what} has the logical axis {axis!r}, "
                f"for which [{name}] has no rule.{did_you_mean(axis, section)} "
                f"Add {axis} = [] to keep it whole."
            )
        for part in section[axis]:
            if part in owner:
                raise RuleError(
                    f"{locate(rules.source, name, axis)}: mesh axis {part!r} would "
                    f"split {what} twice, along {owner[part]!r} and along {axis!r}. "
                    "Take it out of one of the two rules."
                )
            owner[part] = axis
        entries.append(section[axis])
    return entries


def _check_unused(
    rules: Rules, name: str, section: Section, used: set[str], table: ParamTable
) -> None:
    for axis in section:
        if axis not in used:
            raise RuleError(
                f"{locate(rules.source, name, axis)}: model {table.name} has no "
                f"logical axis {axis!r}; remove the rule.{did_you_mean(axis, used)}"
            )
