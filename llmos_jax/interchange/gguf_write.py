"""Turn our parameters into a GGUF file that llama.cpp loads, a tensor at a time.

Where each tensor goes is known from the spec alone, so the header is written first and
tensors, and experts of a stack, wherever they belong as they come.

Letters: N num_heads, K num_kv_heads, H head_dim.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import gguf
import jax
import numpy as np
from gguf import GGMLQuantizationType as Kind

from llmos_jax.data import Tokenizer
from llmos_jax.errors import CheckpointError
from llmos_jax.interchange.check import tensors_of
from llmos_jax.interchange.families import architecture_of
from llmos_jax.interchange.gguf_config import GEMMA_PERIODS
from llmos_jax.interchange.gguf_fields import fields_of_spec, gguf_architecture
from llmos_jax.interchange.gguf_names import (
    ROPE_FACTORS,
    has_one_added,
    place_of,
    rotated_heads,
    to_neighbours,
)
from llmos_jax.interchange.gguf_rope import rope_divisors
from llmos_jax.interchange.gguf_vocabulary import fields_of_tokenizer
from llmos_jax.interchange.load import Progress
from llmos_jax.interchange.room import explained, require_room
from llmos_jax.interchange.weights import weight_map
from llmos_jax.interchange.write import foreign_tensors
from llmos_jax.ir import ModelSpec
from llmos_jax.telemetry import log

Packing = Literal["f16", "q8_0", "f32"]
"""Of matrices: vectors, norms and routers are float32 always, as llama.cpp has them."""

_KINDS = {"f16": Kind.F16, "q8_0": Kind.Q8_0, "f32": Kind.F32}
_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
}
_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_BLOCK_BYTES = 4 << 20
"""Of float32 that are packed at once."""


class _Slot(NamedTuple):
    """A tensor's place in the file."""

    name: str
    shape: tuple[int, ...]
    kind: Kind
    offset: int
    """From where the weights begin."""

    @property
    def nbytes(self) -> int:
        return self.bytes_of(math.prod(self.shape))

    def bytes_of(self, elements: int) -> int:
        block, packed = gguf.GGML_QUANT_SIZES[self.kind]
        return elements // block * packed


def write_gguf(
    file: str | Path,
    spec: ModelSpec,
    params: Mapping[str, jax.Array | np.ndarray],
    tokenizer: Tokenizer,
    *,
    kind: Packing = "f16",
    on_progress: Progress | None = None,
) -> None:
    """Write a model and its tokenizer into one file.

    All is written under another name beside it, which is changed at the end. Host
    memory: two tensors (see `foreign_tensors`), and a block of 4 MiB.

    Args:
        file: to be made; it must not exist.
        spec: of the model.
        params: by path.
        tokenizer: of the model.
        kind: how matrices are stored; with `q8_0`, those whose rows are no multiple of
            32 become float16.
        on_progress: is told the bytes of tensors written so far, and of all.

    Raises:
        ConfigError: the file exists, or llama.cpp has no such model or tokenizer.
        CheckpointError: it cannot be written (no space, for example), or a weight is
            not finite, or too large for `kind`.
    """
    path = Path(file).expanduser().absolute()
    architecture = gguf_architecture(spec)
    slots = _slots(spec, architecture, kind)
    fields = {
        **fields_of_spec(spec, architecture),
        "general.file_type": int(_FILE_TYPES[kind]),
        **fields_of_tokenizer(tokenizer, spec.vocab_size),
    }
    if f"{architecture}.attention.sliding_window" in fields:
        _warn_of_window(spec, architecture)
    partial = path.with_name(f".{path.name}.partial")
    with explained(path):
        require_room(path, sum(slot.nbytes for slot in slots.values()))
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            start = _write_header(partial, architecture, fields, slots)
            with partial.open("r+b") as out:
                _write_tensors(
                    out.fileno(), start, spec, params, architecture, slots, on_progress
                )
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def _slots(spec: ModelSpec, architecture: str, kind: Packing) -> dict[str, _Slot]:
    """Every tensor of the file, one after another."""
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in weight_map(spec, architecture_of(spec)):
        shape = entry.foreign_shape(spec)
        for foreign, _ in tensors_of(entry, spec):
            place = place_of(foreign, architecture)
            assert place is not None, foreign
            stack = () if place.expert is None else (spec.num_experts,)
            shapes[place.name] = (*stack, *shape)
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3":
        shapes[ROPE_FACTORS] = (spec.head_dim // 2,)
    slots, offset = {}, 0
    for name, shape in shapes.items():
        slot = _Slot(name, shape, _kind_of(name, shape, kind), offset)
        slots[name] = slot
        offset += -(-slot.nbytes // _ALIGNMENT) * _ALIGNMENT
    return slots


def _kind_of(name: str, shape: tuple[int, ...], kind: Packing) -> Kind:
    if len(shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return Kind.F32
    if kind == "q8_0" and shape[-1] % gguf.GGML_QUANT_SIZES[Kind.Q8_0][0]:
        return Kind.F16
    return _KINDS[kind]


def _write_header(
    path: Path, architecture: str, fields: Mapping[str, Any], slots: dict[str, _Slot]
) -> int:
    """Write all but the weights, and return where these begin."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for slot in slots.values():
        writer.add_tensor_info(
            slot.name, slot.shape, np.dtype(np.float32), slot.nbytes, slot.kind
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return -(-path.stat().st_size // _ALIGNMENT) * _ALIGNMENT


def _write_tensors(
    fd: int,
    start: int,
    spec: ModelSpec,
    params: Mapping[str, jax.Array | np.ndarray],
    architecture: str,
    slots: dict[str, _Slot],
    on_progress: Progress | None,
) -> None:
    last = max(slots.values(), key=lambda slot: slot.offset)
    os.truncate(fd, start + -(-(last.offset + last.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    total, done = sum(slot.nbytes for slot in slots.values()), 0
    heads = (spec.num_heads, spec.num_kv_heads)
    for name, array, expert in _arrays(spec, params, architecture):
        slot = slots[name]
        rotated = rotated_heads(name, architecture, heads)
        values = to_neighbours(array, rotated) if rotated else array
        shape = slot.shape if expert is None else slot.shape[1:]
        assert values.shape == shape, (name, values.shape, shape)
        part = slot.bytes_of(values.size)
        at = start + slot.offset + (expert or 0) * part
        for block in _packed(values, slot, float(has_one_added(name, architecture))):
            _write_all(fd, block, at)
            at += len(block)
        done += part
        if on_progress is not None:
            on_progress(done, total)
    assert done == total, (done, total)


def _arrays(
    spec: ModelSpec, params: Mapping[str, jax.Array | np.ndarray], architecture: str
) -> Iterator[tuple[str, np.ndarray, int | None]]:
    """GGUF's name, Hugging Face's values, and which expert of a stack they are."""
    for foreign, array in foreign_tensors(spec, params):
        place = place_of(foreign, architecture)
        assert place is not None, foreign
        yield place.name, array, place.expert
    if spec.rope_scaling is not None and spec.rope_scaling.kind == "llama3":
        divisors = rope_divisors(spec.rope_scaling, spec.rope_theta, spec.head_dim)
        yield ROPE_FACTORS, divisors, None


def _packed(values: np.ndarray, slot: _Slot, added: float) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, block after block of its rows."""
    rows = values.reshape(-1, values.shape[-1])
    at_once = max(1, _BLOCK_BYTES // (4 * rows.shape[1]))
    for row in range(0, len(rows), at_once):
        block = rows[row : row + at_once].astype(np.float32) + np.float32(added)
        limit = float(np.finfo(np.float16).max)
        if slot.kind == Kind.F32:
            limit = float(np.finfo(np.float32).max)
        elif slot.kind == Kind.Q8_0:
            limit *= 127  # a block's scale, its largest number / 127, is a float16
        largest = np.abs(block).max()
        if not largest <= limit:
            raise CheckpointError(
                f"tensor {slot.name} holds {largest:g}, and {slot.kind.name} ends at "
                f"{limit:g}. Choose another kind, or look at how it was trained."
            )
        packed = np.ascontiguousarray(gguf.quantize(block, slot.kind))
        yield packed.reshape(-1).view(np.uint8).data


def _write_all(fd: int, block: memoryview, at: int) -> None:
    while block:
        count = os.pwrite(fd, block, at)
        block, at = block[count:], at + count


def _warn_of_window(spec: ModelSpec, architecture: str) -> None:
    window = spec.sliding_window
    if window is not None and architecture not in GEMMA_PERIODS:
        log(
            f"{spec.name}: llama.cpp has no sliding window in {architecture} models; "
            f"texts of more than {window} tokens are continued otherwise there"
        )
