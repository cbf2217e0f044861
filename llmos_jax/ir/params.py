"""ParamTable: every parameter of a model as a plain row, before any exists.

`models.param_table` makes it by evaluating a Flax NNX module abstractly; planner,
rules, lowering and checkpoint read it. It is the one place where shapes and logical
axes meet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.ir.artefact import Artefact
from llmos_jax.ir.model import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamRow:
    """One parameter: dotted path, shape, dtype name, one logical axis per dimension."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    is_frozen: bool = False
    """Whether training leaves it as it is (the weights beside LoRA's factors)."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamTable(Artefact):
    """All rows of a model, sorted by path, with its spec when it has one."""

    name: str
    rows: tuple[ParamRow, ...]
    spec: ModelSpec | None = None

    @property
    def num_params(self) -> int:
        """Parameters of the whole model; scales of few-bit matrices are none."""
        if self.spec is not None and self.spec.quantization is not None:
            return self.spec.num_params
        return sum(row.size for row in self.rows)

    @property
    def trained(self) -> tuple[str, ...]:
        """Paths of what training changes."""
        return tuple(row.path for row in self.rows if not row.is_frozen)

    @property
    def active_params(self) -> int:
        """Parameters that one token passes through: all, but for unchosen experts."""
        spec = self.spec
        if spec is None or not spec.num_experts:
            return self.num_params
        experts = sum(row.size for row in self.rows if "experts" in row.axes)
        return (
            self.num_params
            - experts
            + (experts * spec.experts_per_token // spec.num_experts)
        )

    def row(self, path: str) -> ParamRow:
        """Return the row of `path`, or raise ConfigError with the nearest name."""
        for row in self.rows:
            if row.path == path:
                return row
        known = [row.path for row in self.rows]
        raise ConfigError(
            f"model {self.name} has no parameter {path!r}.{did_you_mean(path, known)}"
        )

    def axis_sizes(self) -> dict[str, int]:
        """Size of each logical axis; the largest where rows differ."""
        sizes: dict[str, int] = {}
        for row in self.rows:
            for axis, size in zip(row.axes, row.shape, strict=True):
                if axis is not None:
                    sizes[axis] = max(size, sizes.get(axis, 0))
        return sizes
