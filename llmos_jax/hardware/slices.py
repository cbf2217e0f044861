"""Turn a slice's name, or what JAX reports, into a Topology.

    [SLICES*]CHIP:SHAPE     v5e:4x4  v5p:4x4x8  2*v6e:16x16  h100:8  4*h100:8  cpu:8
    [SLICES*]CLOUD-NAME     v5p-128  v6e-256  v5litepod-16

Cloud names count cores for v4, v5p and tpu7x (two a chip) and chips for v5e and v6e
(MaxText, accelerator_to_spec_map.py). An axis of a torus closes into a ring, for v5e
and v6e, where it is the full 16; for v4, v5p and tpu7x, where every dimension is a
multiple of 4 (scaling-book, tpus.md). A GPU slice is one NVLink domain, so one host.

Caveat: twisted tori, NVL72 racks and slices with failed links are not described.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.hardware.chips import CHIPS, chip
from llmos_jax.ir.topology import Chip, Topology

FORMS = "cpu:8, v5e:4x4, v5p:4x4x8, h100:8, 2*v6e:16x16, v5p-128"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Limits:
    """Which slices of a chip exist."""

    pod: tuple[int, ...]
    """The largest slice, dimension by dimension, ascending."""
    max_chips: int
    units_per_chip: int = 1
    """What a Cloud name counts: cores (2 a chip) or chips."""


# scaling-book, tpus.md and Cloud's pages (2026-08); tpu7x: MaxText lists tpu7x-18432.
# GPU: NVLink domain of an HGX board. cpu: as many as XLA will simulate in one process.
_LIMITS = {
    "v4": _Limits(pod=(16, 16, 16), max_chips=4096, units_per_chip=2),
    "v5e": _Limits(pod=(16, 16), max_chips=256),
    "v5p": _Limits(pod=(16, 20, 28), max_chips=8960, units_per_chip=2),
    "v6e": _Limits(pod=(16, 16), max_chips=256),
    "tpu7x": _Limits(pod=(16, 24, 24), max_chips=9216, units_per_chip=2),
    "a100": _Limits(pod=(8,), max_chips=8),
    "h100": _Limits(pod=(8,), max_chips=8),
    "h200": _Limits(pod=(8,), max_chips=8),
    "b200": _Limits(pod=(8,), max_chips=8),
    "cpu": _Limits(pod=(4096,), max_chips=4096),
}
_CLOUD_NAMES = {
    "v4": "v4",
    "v5litepod": "v5e",
    "v5e": "v5e",
    "v5p": "v5p",
    "v6e": "v6e",
    "tpu7x": "tpu7x",
}
# jax Device.device_kind, jax/_src/tpu_info.py and MaxText accelerator_to_spec_map.py.
_TPU_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
    "TPU v7x": "tpu7x",
}
# Slices of v5e and v6e (Cloud's pages, 2026-08).
_FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Smaller than a 4x4x4 cube: parts of one host and of one rack.
_SMALL_CUBES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))


def parse_topology(name: str) -> Topology:
    """Return the Topology of `name`, whose `name` is the canonical form.

    Raises:
        ConfigError: an unknown chip, a malformed name, or a slice that does not exist.
    """
    text = name.strip()
    slices, rest = _split_slices(text)
    if ":" in rest:
        kind, _, sizes = rest.partition(":")
        found = _known_chip(kind, text)
        shape = _shape_of(found, sizes, text)
    else:
        found, shape = _cloud_shape(rest, text)
    return _topology(found, shape, slices)


def topology_of_devices(
    platform: str,
    device_kind: str,
    count: int,
    *,
    slices: int = 1,
    memory_bytes: float | None = None,
) -> Topology:
    """Return the Topology of devices that JAX reports, in the most square legal shape.

    Args:
        platform: `device.platform`: cpu, tpu, gpu, cuda or rocm.
        device_kind: `device.device_kind`.
        count: JAX devices over all slices.
        slices: Slices (TPU) or hosts (GPU) they lie in.
        memory_bytes: What one device may use, where the runtime tells.

    Raises:
        ConfigError: a kind that has no facts here, or a number that no slice has.
    """
    found = chip(_chip_name(platform, device_kind))
    if count < 1 or slices < 1 or count % (slices * found.devices_per_chip):
        raise ConfigError(
            f"{count} devices of kind {device_kind!r} in {slices} slices: each slice "
            f"holds a whole number of {found.name} chips of {found.devices_per_chip} "
            "device(s). Say which machine it is: --set topology=..."
        )
    chips = count // slices // found.devices_per_chip
    shapes = [shape for shape in _legal_shapes(found.name) if math.prod(shape) == chips]
    if not shapes:
        raise ConfigError(
            f"no {found.name} slice has {chips} chips ({count} devices of kind "
            f"{device_kind!r}). Say which machine it is: "
            f"--set topology={found.name}:..."
        )
    topology = _topology(found, _most_square(shapes), slices)
    if memory_bytes is None:
        return topology
    hbm = memory_bytes * found.devices_per_chip
    return replace(topology, chip=replace(topology.chip, hbm_bytes=hbm))


def legal_topologies(
    name: str, max_chips: int, max_slices: int = 1
) -> Iterator[Topology]:
    """Every machine of one chip with at most `max_chips`, fewest chips first.

    Of what comes in any number (GPUs, simulated devices) only the powers of two;
    several GPU hosts are whole hosts.

    Raises:
        ConfigError: an unknown chip.
    """
    found = chip(name)
    shapes = _legal_shapes(found.name)
    if found.torus_dims == 0:
        shapes = frozenset(s for s in shapes if math.prod(s).bit_count() == 1)
    most = _LIMITS[found.name].max_chips
    machines = [
        (slices * math.prod(shape), slices, shape)
        for shape in shapes
        for slices in range(1, max_slices + 1)
        if slices == 1 or found.vendor == "tpu" or math.prod(shape) == most
    ]
    for chips, slices, shape in sorted(machines, key=lambda m: (m[0], m[1], sum(m[2]))):
        if chips <= max_chips:
            yield _topology(found, shape, slices)


def next_slices(topology: Topology) -> tuple[Topology | None, Topology | None]:
    """The next smaller and the next larger machine of this kind, each most square.

    A slice whose chips divide these, or are divided by them, comes before one that is
    nearer: what is planned here divides there. A machine of several slices keeps their
    number while their size can change; the smallest slice is followed by half as many,
    the largest by twice as many.
    """
    shapes = {shape for shape in _legal_shapes(topology.chip.name)}
    if topology.chip.torus_dims == 0:
        shapes = {s for s in shapes if math.prod(s).bit_count() == 1}
    here = math.prod(topology.shape)
    below = [shape for shape in shapes if math.prod(shape) < here]
    above = [shape for shape in shapes if math.prod(shape) > here]
    several, slices = topology.slices > 1, topology.slices
    if topology.chip.vendor == "gpu" and several:
        below, above = [], []
    even_below = [shape for shape in below if here % math.prod(shape) == 0]
    even_above = [shape for shape in above if math.prod(shape) % here == 0]
    smaller = _largest(even_below or below) if below else topology.shape
    larger = _smallest(even_above or above) if above else topology.shape
    fewer = slices if below else slices // 2
    more = slices if above else slices * 2
    return (
        _topology(topology.chip, smaller, fewer) if fewer else None,
        _topology(topology.chip, larger, more),
    )


def _largest(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    most = max(map(math.prod, shapes))
    return _most_square([shape for shape in shapes if math.prod(shape) == most])


def _smallest(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    least = min(map(math.prod, shapes))
    return _most_square([shape for shape in shapes if math.prod(shape) == least])


def _split_slices(text: str) -> tuple[int, str]:
    if "*" not in text:
        return 1, text
    count, _, rest = text.partition("*")
    if not count.strip().isdigit() or int(count) < 1:
        raise ConfigError(
            f"topology {text!r}: {count.strip()!r} slices; write a whole number "
            "from 1, as in 2*v6e:16x16."
        )
    return int(count), rest.strip()


def _known_chip(kind: str, text: str) -> Chip:
    if kind not in CHIPS:
        raise ConfigError(
            f"topology {text!r}: unknown chip {kind!r}.{did_you_mean(kind, CHIPS)}\n"
            f"  Forms: {FORMS}."
        )
    return CHIPS[kind]


def _shape_of(found: Chip, sizes: str, text: str) -> tuple[int, ...]:
    parts = sizes.split("x")
    dims = len(_LIMITS[found.name].pod)
    if not all(re.fullmatch(r"[0-9]+", part) for part in parts):
        raise ConfigError(
            f"topology {text!r}: {sizes!r} is no shape; write whole numbers joined "
            f"by x, as in {_example(found.name)}."
        )
    shape = tuple(int(part) for part in parts)
    if 0 in shape:
        raise ConfigError(f"topology {text!r}: every dimension must be at least 1.")
    if len(shape) != dims:
        wanted = "one number of chips" if dims == 1 else f"a {dims}-D torus"
        raise ConfigError(
            f"topology {text!r}: {found.name} takes {wanted}, not {len(shape)} "
            f"numbers; as in {_example(found.name)}."
        )
    shape = _canonical(shape)
    _check_exists(found, shape, text)
    return shape


def _check_exists(found: Chip, shape: tuple[int, ...], text: str) -> None:
    limits = _LIMITS[found.name]
    chips = math.prod(shape)
    if shape in _legal_shapes(found.name):
        return
    ascending = sorted(shape)
    if chips > limits.max_chips or any(
        size > most for size, most in zip(ascending, limits.pod, strict=True)
    ):
        raise ConfigError(_too_large(found, chips, text))
    rule = "Slices: " + ", ".join("x".join(map(str, s)) for s in _FLAT_SHAPES[1:]) + "."
    if found.torus_dims == 3:
        rule = (
            "From 4x4x4 on, every dimension is a multiple of 4; below: 2x2x1, 2x2x2, "
        )
        rule += "2x2x4, 2x4x4."
    raise ConfigError(
        f"topology {text!r}: no {found.name} slice has this shape. {rule}"
    )


def _too_large(found: Chip, chips: int, text: str) -> str:
    limits = _LIMITS[found.name]
    pod = "x".join(map(str, limits.pod))
    head = f"topology {text!r}: {chips} chips do not fit in one {found.name} slice, "
    if found.vendor == "gpu":
        hosts = math.ceil(chips / limits.max_chips)
        return (
            f"{head}which is one NVLink domain of {limits.max_chips} GPUs. "
            f"Write {hosts}*{found.name}:{limits.max_chips}."
        )
    remedy = "Several slices are written 2*" + f"{found.name}:{pod}."
    return f"{head}whose largest is {pod} ({limits.max_chips} chips). {remedy}"


def _cloud_shape(rest: str, text: str) -> tuple[Chip, tuple[int, ...]]:
    match = re.fullmatch(r"([a-z0-9]+)-([0-9]+)", rest)
    if not match:
        kind = re.split(r"[-:]", rest)[0]
        hint = "" if kind in CHIPS else did_you_mean(kind, CHIPS)
        raise ConfigError(
            f"topology {text!r} is no machine's name.{hint}\n  Forms: {FORMS}."
        )
    family, number = match[1], int(match[2])
    if family not in _CLOUD_NAMES:
        known = f"topology {text!r}: unknown Cloud TPU {family!r}."
        if family in CHIPS:
            raise ConfigError(f"{known} Write {family}:{number}.")
        raise ConfigError(known + did_you_mean(family, _CLOUD_NAMES))
    found = CHIPS[_CLOUD_NAMES[family]]
    units = _LIMITS[found.name].units_per_chip
    chips, odd = divmod(number, units)
    shapes = [s for s in _legal_shapes(found.name) if math.prod(s) == chips]
    if not odd and shapes:
        return found, _most_square(shapes)
    if chips > _LIMITS[found.name].max_chips:
        raise ConfigError(_too_large(found, chips, text))
    sizes = sorted({math.prod(s) * units for s in _legal_shapes(found.name)})
    below = [size for size in sizes if size < number][-1:]
    above = [size for size in sizes if size > number][:1]
    near = " and ".join(f"{family}-{size}" for size in below + above)
    counted = f" ({family} counts cores, {units} a chip)" if units > 1 else ""
    raise ConfigError(
        f"topology {text!r}: there is no {found.name} slice of this size{counted}; "
        f"the nearest: {near}."
    )


def _topology(found: Chip, shape: tuple[int, ...], slices: int) -> Topology:
    if found.vendor == "cpu":
        share = _host_memory_bytes() / (slices * math.prod(shape))
        found = replace(found, hbm_bytes=share)
    label = f"{found.name}:{'x'.join(map(str, shape))}"
    return Topology(
        name=label if slices == 1 else f"{slices}*{label}",
        chip=found,
        shape=shape,
        slices=slices,
        wraps=_wraps(found, shape),
    )


def _wraps(found: Chip, shape: tuple[int, ...]) -> tuple[bool, ...]:
    if found.torus_dims == 2:
        return tuple(size == 16 for size in shape)
    if found.torus_dims == 3:
        return (all(size % 4 == 0 for size in shape),) * 3
    return (False,) * len(shape)


def _canonical(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Ascending, as Cloud writes it, but with ones last (2x2x1)."""
    return tuple(sorted(shape, key=lambda size: (size == 1, size)))


def _most_square(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return min(shapes, key=lambda shape: (sum(shape), shape))


@cache
def _legal_shapes(name: str) -> frozenset[tuple[int, ...]]:
    limits = _LIMITS[name]
    if len(limits.pod) == 1:
        return frozenset((count,) for count in range(1, limits.max_chips + 1))
    if len(limits.pod) == 2:
        return frozenset(_FLAT_SHAPES)
    steps = [range(4, most + 1, 4) for most in limits.pod]
    cubes = {
        shape
        for shape in itertools.product(*steps)
        if shape == tuple(sorted(shape)) and math.prod(shape) <= limits.max_chips
    }
    return frozenset(cubes | set(_SMALL_CUBES))


def _example(name: str) -> str:
    by_dims = {1: f"{name}:8", 2: f"{name}:4x4", 3: f"{name}:4x4x4"}
    return by_dims[len(_LIMITS[name].pod)]


def _chip_name(platform: str, device_kind: str) -> str:
    if platform == "cpu":
        return "cpu"
    if device_kind in _TPU_KINDS:
        return _TPU_KINDS[device_kind]
    if platform != "tpu":
        for name in ("a100", "h100", "h200", "b200"):
            if re.search(rf"\b{name}\b", device_kind, re.IGNORECASE):
                return name
    raise ConfigError(
        f"no facts about devices of kind {device_kind!r} (platform {platform}). Name "
        f"the nearest machine that is known: --set topology=..., one of "
        f"{', '.join(CHIPS)}."
    )


def _host_memory_bytes() -> float:
    """RAM of this machine, or the container's limit where that is lower."""
    ram = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limit = Path("/sys/fs/cgroup/memory.max")  # cgroup v2; "max" where unlimited
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(ram, float(text)) if text.isdigit() else ram
