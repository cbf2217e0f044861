"""The ParamTable of a Llama-family ModelSpec, written out by hand for host-wing
tests."""

from __future__ import annotations

import tomllib

import msgspec

from llmos_jax.ir import ModelSpec, ParamRow, ParamTable
from llmos_jax.places import data_folder


def spec_of(name: str) -> ModelSpec:
    """Read configs/models/NAME.toml without the config floor."""
    path = data_folder("configs") / "models" / f"{name}.toml"
    return msgspec.convert(tomllib.loads(path.read_text()), ModelSpec).check()


def table_of(spec: ModelSpec | str) -> ParamTable:
    """Return the rows that models.param_table makes for a Llama-family decoder."""
    spec = spec_of(spec) if isinstance(spec, str) else spec
    L, D, F = spec.num_layers, spec.embed_dim, spec.ffn_dim
    N, K, H, V = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size
    rows = {
        "embed.table": ((V, D), ("vocab", "embed")),
        "final_norm.scale": ((D,), ("norm",)),
        "layers.attention.k": (
            (L, D, K, H),
            ("layers", "embed", "kv_heads", "head_dim"),
        ),
        "layers.attention.o": ((L, N, H, D), ("layers", "heads", "head_dim", "embed")),
        "layers.attention.q": ((L, D, N, H), ("layers", "embed", "heads", "head_dim")),
        "layers.attention.v": (
            (L, D, K, H),
            ("layers", "embed", "kv_heads", "head_dim"),
        ),
        "layers.attention_norm.scale": ((L, D), ("layers", "norm")),
        "layers.ffn.down": ((L, F, D), ("layers", "ffn", "embed")),
        "layers.ffn.gate": ((L, D, F), ("layers", "embed", "ffn")),
        "layers.ffn.up": ((L, D, F), ("layers", "embed", "ffn")),
        "layers.ffn_norm.scale": ((L, D), ("layers", "norm")),
    }
    if not spec.tied_embeddings:
        rows["head.kernel"] = ((D, V), ("embed", "vocab"))
    return ParamTable(
        name=spec.name,
        rows=tuple(
            ParamRow(path=path, shape=shape, dtype="float32", axes=axes)
            for path, (shape, axes) in sorted(rows.items())
        ),
        spec=spec,
    )
