"""Split a model into its structure and a flat dict of parameters, once.

Everything above handles parameters as `{dotted path: array}`: sharding, optimizer
state, checkpoints and conversion become maps over one dict, and a jitted step never
walks a module graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx

from llmos_jax.errors import ConfigError, did_you_mean
from llmos_jax.ir import ModelSpec, ParamRow, ParamTable
from llmos_jax.models.decoder import Decoder
from llmos_jax.models.encoder import TransformerClassifier
from llmos_jax.models.lstm import LstmClassifier

Params = dict[str, jax.Array]
"""Parameter path -> array."""

FAMILIES: dict[str, Callable[..., nnx.Module]] = {
    "llama": Decoder,
    "moe": Decoder,
    "lstm_classifier": LstmClassifier,
    "transformer_classifier": TransformerClassifier,
}
"""Family name -> `constructor(spec, rngs=...)`."""


@functools.lru_cache(maxsize=32)
def _paths_of(table: ParamTable) -> frozenset[str]:
    return frozenset(row.path for row in table.rows)


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model without values: its spec, its table, its graph."""

    spec: ModelSpec
    table: ParamTable
    graph: Any

    @property
    def has_decoder(self) -> bool:
        """Whether its layers are a decoder's."""
        return FAMILIES[self.spec.family] is Decoder

    def init(self, key: jax.Array) -> Params:
        """Draw fresh float32 parameters from a key; jit it with output shardings."""
        with nnx.use_eager_sharding(False):
            module = _construct(self.spec, nnx.Rngs(params=key))
        return _flatten(nnx.state(module, nnx.Param))

    def cast(self, params: Params, dtype: str) -> Params:
        """Parameters as they are computed with; see `keeps_dtype`."""
        return {
            path: x if self.keeps_dtype(path) else x.astype(dtype)
            for path, x in params.items()
        }

    def keeps_dtype(self, path: str) -> bool:
        """Whether a parameter is computed with as it is stored.

        Routers are: where a router's largest logits swap places, other experts run
        (Switch Transformer, arXiv 2101.03961, section 2.4). So are matrices in few bits
        and their scales.
        """
        owner = path.rpartition(".")[0]
        return path.endswith(".router") or f"{owner}.values" in _paths_of(self.table)

    def bind(self, params: Params) -> Any:
        """Return the module that computes with `params`; free under jit."""
        flat = [(tuple(path.split(".")), nnx.Param(params[path])) for path in params]
        return nnx.merge(self.graph, nnx.from_flat_state(flat))


def skeleton(spec: ModelSpec) -> Skeleton:
    """Evaluate a model of `spec` abstractly; no memory is used."""
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(lambda: _construct(spec, nnx.Rngs(params=0)))
    return Skeleton(
        spec=spec,
        table=_table(spec.name, module, spec),
        graph=nnx.graphdef(module),
    )


def param_table(model: ModelSpec | nnx.Module | Callable[[], nnx.Module]) -> ParamTable:
    """Return every parameter of a model as rows, without making any.

    Args:
        model: a ModelSpec, a Flax NNX module of your own, or a function that makes one
            (evaluated abstractly). Its parameters carry logical axis names:
            `nnx.Param(value, out_sharding=("embed", "ffn"))`.

    Raises:
        ConfigError: a parameter without logical axes, or with too few.
    """
    if isinstance(model, ModelSpec):
        return skeleton(model).table
    if isinstance(model, nnx.Module):
        return _table(type(model).__name__, model, None)
    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(model)
    return _table(type(module).__name__, module, None)


def _construct(spec: ModelSpec, rngs: nnx.Rngs) -> nnx.Module:
    if spec.family not in FAMILIES:
        raise ConfigError(
            f"model {spec.name}: unknown family {spec.family!r}."
            f"{did_you_mean(spec.family, FAMILIES)}"
        )
    return FAMILIES[spec.family](spec, rngs=rngs)


def _flatten(state: nnx.State) -> Params:
    return {
        ".".join(map(str, path)): leaf.get_value()
        for path, leaf in sorted(nnx.to_flat_state(state))
    }


def _is_frozen(path: str, spec: ModelSpec | None) -> bool:
    """With LoRA all but the factors are; of a classifier never its head."""
    if spec is None or path.startswith("classifier."):
        return False
    if spec.lora is not None:
        return "_lora." not in path
    return spec.classes is not None and spec.classes.is_frozen


def _table(name: str, module: nnx.Module, spec: ModelSpec | None) -> ParamTable:
    rows = []
    for path, leaf in sorted(nnx.to_flat_state(nnx.state(module, nnx.Param))):
        dotted = ".".join(map(str, path))
        value, metadata = leaf.get_value(), leaf.get_metadata()
        axes = metadata.get("out_sharding", metadata.get("sharding_names"))
        if axes is None or len(axes) != len(value.shape):
            raise ConfigError(
                f"parameter {dotted} of {name} has shape {tuple(value.shape)} and "
                f"logical axes {axes}; it needs one name per dimension: "
                "nnx.Param(value, out_sharding=('embed', 'ffn'))."
            )
        rows.append(
            ParamRow(
                path=dotted,
                shape=tuple(value.shape),
                dtype=str(value.dtype),
                axes=tuple(axes),
                is_frozen=_is_frozen(dotted, spec),
            )
        )
    return ParamTable(name=name, rows=tuple(rows), spec=spec)
