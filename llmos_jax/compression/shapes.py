"""Turn a model's sizes and a share of its parameters into sizes to try.

A candidate has some of the layers, of the key/value heads (each with its query heads),
of the embedding channels and of the feed-forward channels. Three of the four take a few
values each; the last is set so that the parameters are what was asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import product

from llmos_jax.config.schema import PruneSection
from llmos_jax.errors import ConfigError
from llmos_jax.ir import ModelSpec, Topology

SIZES = {
    "ffn": "ffn_dim",
    "layers": "num_layers",
    "embed": "embed_dim",
    "kv_heads": "num_kv_heads",
}
"""PruneSection.shrink -> field; the first that is free is fitted to the others, for it
has the finest steps."""

SMALLEST = 1 / 3
"""Of a size: less is not tried unless it is pinned. A judgement."""

STEPS = 5
"""Values that each size takes which is not fitted, its whole among them: 125 shapes at
most, which the planner needs seconds for. A judgement."""

TOLERANCE = 0.03
"""Share of the parameters by which a shape may miss what was asked for: a step of 64
feed-forward channels of SmolLM2-135M is 2.5 %. A judgement."""

MULTIPLES = {"tpu": 128, "gpu": 64, "cpu": 32}
"""Widths that a chip takes whole: a TPU's 128 lanes; 32 whole numbers of an AVX2
register. 64 for GPUs is a judgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes that pruning changes."""

    num_layers: int
    embed_dim: int
    num_kv_heads: int
    ffn_dim: int

    def of(self, spec: ModelSpec) -> ModelSpec:
        """A model with these sizes and its first layers, named by its parameters."""
        made = replace(
            spec,
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            ffn_dim=self.ffn_dim,
            num_kv_heads=self.num_kv_heads,
            num_heads=spec.num_heads // spec.num_kv_heads * self.num_kv_heads,
            norm_eps=spec.norm_eps * spec.embed_dim / self.embed_dim,
        )
        return replace(made, name=f"{spec.name}-{_count(made.num_params)}").check()

    def shrinks(self, spec: ModelSpec) -> frozenset[str]:
        """Which sizes are less than a model's."""
        return frozenset(
            name
            for name in sizes_by_name(spec)
            if getattr(self, name) < _has(spec, name)
        )


def sizes_by_name(spec: ModelSpec) -> dict[str, int]:
    """The sizes of a model that pruning changes."""
    return {field.name: getattr(spec, field.name) for field in fields(Shape)}


def check_shapes(spec: ModelSpec, asked: PruneSection) -> None:
    """Raise ConfigError for sizes that no smaller model of this one has."""
    if not 0 < asked.keep < 1:
        raise ConfigError(
            f"prune.keep = {asked.keep:g}; it is the share of the parameters that "
            "stay and must lie between 0 and 1, for example 0.67."
        )
    if asked.candidates < 1:
        raise ConfigError(
            f"prune.candidates = {asked.candidates}; at least one shape must be tried."
        )
    if asked.multiple is not None and asked.multiple < 1:
        raise ConfigError(f"prune.multiple = {asked.multiple}; it must be at least 1.")
    pinned = _pins(asked)
    for name, size in pinned.items():
        if not 1 <= size <= _has(spec, name):
            raise ConfigError(
                f"prune.{name} = {size}; {spec.name} has {_has(spec, name)}, and "
                "pruning keeps between 1 and all of them."
            )
    if not asked.shrink and not pinned:
        raise ConfigError(
            "prune.shrink is empty and no size is pinned, so nothing may become "
            "smaller. Choose among ffn, kv_heads, embed, layers."
        )


def multiple_of(asked: PruneSection, topology: Topology) -> int:
    """What widths are multiples of."""
    return asked.multiple or MULTIPLES[topology.chip.vendor]


def shapes(spec: ModelSpec, asked: PruneSection, multiple: int) -> list[Shape]:
    """The shapes to choose from, the nearest to the asked parameters first.

    Args:
        spec: the whole model.
        asked: share of parameters, what may shrink, pins.
        multiple: of widths.

    Raises:
        ConfigError: no smaller shape meets what was asked.
    """
    check_shapes(spec, asked)
    target = asked.keep * spec.num_params
    values = {name: _values(spec, asked, name, multiple) for name in SIZES.values()}
    fitted = next((name for name in values if len(values[name]) > 1), "ffn_dim")
    others = {name: _few(values[name]) for name in values if name != fitted}

    def off(shape: Shape) -> float:
        return abs(shape.of(spec).num_params / target - 1)

    found = []
    for chosen in product(*others.values()):
        sizes = dict(zip(others, chosen))
        fitting = [Shape(**sizes, **{fitted: size}) for size in values[fitted]]
        found.append(min(fitting, key=off))
    found = sorted((one for one in found if one.shrinks(spec)), key=off)
    if not found:
        raise ConfigError(
            f"no shape smaller than {spec.name} has widths that are multiples of "
            f"{multiple}. Set prune.multiple to less, or pin sizes."
        )
    near = [shape for shape in found if off(shape) <= TOLERANCE]
    return near or found[: asked.candidates]


def _pins(asked: PruneSection) -> dict[str, int]:
    pins = {name: getattr(asked, name) for name in SIZES.values()}
    return {name: size for name, size in pins.items() if size is not None}


def _has(spec: ModelSpec, name: str) -> int:
    size: int = getattr(spec, name)
    return size


def _values(
    spec: ModelSpec, asked: PruneSection, name: str, multiple: int
) -> list[int]:
    """What a size may be, largest first."""
    whole, pinned = _has(spec, name), _pins(asked)
    if name in pinned:
        return [pinned[name]]
    if not any(SIZES[kind] == name for kind in asked.shrink):
        return [whole]
    step = multiple if name in ("ffn_dim", "embed_dim") else 1
    smaller = range(whole - 1, 0, -1)
    return [whole, *(n for n in smaller if n % step == 0 and n >= SMALLEST * whole)]


def _few(values: Sequence[int]) -> list[int]:
    """Some of the values, spread evenly, the first and the last among them."""
    if len(values) <= STEPS:
        return list(values)
    last = len(values) - 1
    return [values[round(step * last / (STEPS - 1))] for step in range(STEPS)]


def _count(params: int) -> str:
    """134515008 -> 135m."""
    if params < 1e6:
        return f"{params / 1e3:.0f}k"
    return f"{params / 1e6:.0f}m" if params < 1e9 else f"{params / 1e9:.1f}b"
