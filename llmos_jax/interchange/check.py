"""Compare an archive's tensors with those of its model, before any is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from llmos_jax.errors import CheckpointError
from llmos_jax.interchange.archive import Archive
from llmos_jax.interchange.families import architecture_of
from llmos_jax.interchange.weights import Entry, weight_map
from llmos_jax.ir import ModelSpec

FLOATS = ("float32", "bfloat16", "float16")
_SHOWN = 10
_ROWS = 1 << 12


def checked_map(archive: Archive, spec: ModelSpec) -> tuple[Entry, ...]:
    """Return the weight map of `spec` if the archive holds what it needs, no more.

    Tolerated beside it: rotary frequencies, which are computed, and a `lm_head` of a
    tied model that equals its embeddings.

    Raises:
        CheckpointError: with the names of what is missing, extra, or of another shape
            or dtype.
        ConfigError: no family has the features of `spec`.
    """
    entries = weight_map(spec, architecture_of(spec))
    tensors = archive.tensors
    wanted = {
        name: entry.foreign_shape(spec)
        for entry in entries
        for name, _ in tensors_of(entry, spec)
    }
    both = [name for name in wanted if name in tensors]
    extra = [
        name
        for name in tensors
        if name not in wanted and not name.endswith(".rotary_emb.inv_freq")
    ]
    if "lm_head.weight" in extra and _is_tied(archive, spec):
        extra.remove("lm_head.weight")
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "not this model's": extra,
        "of another shape": [
            f"{name} {_shape(tensors[name].shape)} instead of {_shape(wanted[name])}"
            for name in both
            if tensors[name].shape != wanted[name]
        ],
        "of a kind that cannot be read": [
            f"{name} {tensors[name].dtype} instead of {', '.join(FLOATS)}"
            for name in both
            if tensors[name].dtype not in FLOATS
        ],
    }
    if any(faults.values()):
        raise CheckpointError(
            f"{archive.path} does not hold the model that its config describes"
            f" ({len(wanted)} tensors): {_told(faults)}."
        )
    return entries


def tensors_of(entry: Entry, spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every foreign tensor of a parameter, and its place in our leading axes."""
    for place in itertools.product(*map(range, entry.stack(spec))):
        yield entry.name_of(*place), place


def _is_tied(archive: Archive, spec: ModelSpec) -> bool:
    """Whether a head that should not be there is the embedding table once more."""
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    facts = archive.tensors
    if not spec.tied_embeddings or table not in facts:
        return False
    if facts[head][:2] != facts[table][:2] or facts[head].dtype not in FLOATS:
        return False
    starts = range(0, facts[head].shape[0], _ROWS)
    return all(
        archive.read(head, rows).tobytes() == archive.read(table, rows).tobytes()
        for rows in (slice(start, start + _ROWS) for start in starts)
    )


def _told(faults: Mapping[str, list[str]]) -> str:
    left = _SHOWN
    parts = []
    for what, names in faults.items():
        if names:
            shown = names[:left]
            left -= len(shown)
            more = ", ..." if len(names) > len(shown) else ""
            parts.append(f"{len(names)} {what}: {', '.join(shown)}{more}")
    return "; ".join(parts)


def _shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
