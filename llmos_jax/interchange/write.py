"""Turn our parameters into a Hugging Face folder, one layer's tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llmos_jax.data import Tokenizer
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange.check import tensors_of
from llmos_jax.interchange.families import architecture_of, config_of
from llmos_jax.interchange.layout import turn
from llmos_jax.interchange.load import Progress
from llmos_jax.interchange.room import explained, require_room
from llmos_jax.interchange.safetensors_file import DTYPES, header_bytes
from llmos_jax.interchange.weights import Entry, weight_map
from llmos_jax.ir import ModelSpec

SHARD_BYTES = 5_000_000_000


class _Tensor(NamedTuple):
    """A foreign tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    entry: Entry
    place: tuple[int, ...]
    """Layer and expert."""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def foreign_tensors(
    spec: ModelSpec, params: Mapping[str, jax.Array | np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every tensor of the Hugging Face model in its layout; do not write to it.

    Host memory: one layer of one parameter (for experts all of that layer), and one
    tensor.

    Args:
        spec: of the model; its LoRA factors, if any, must have been merged.
        params: by path, of any dtype that safetensors has for weights, whole or split
            over this process's devices.

    Raises:
        ConfigError: the model has features that no family has, or LoRA factors.
        CheckpointError: parameters that other processes hold, or of another dtype.
    """
    for tensor, array in _arrays(spec, params, _tensors(spec, params)):
        yield tensor.name, array


def write_huggingface(
    folder: str | Path,
    spec: ModelSpec,
    params: Mapping[str, jax.Array | np.ndarray],
    tokenizer: Tokenizer,
    *,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Progress | None = None,
) -> None:
    """Write config.json, safetensors files of at most `shard_bytes` of data (or of one
    tensor), and the tokenizer's files; transformers loads the folder.

    All is written under another name beside it, which is changed at the end.

    Args:
        folder: to be made; it may exist if it is empty.
        spec: of the model.
        params: by path.
        tokenizer: goes along; its end mark becomes the model's.
        shard_bytes: of data, per file.
        on_progress: is told the bytes of tensors written so far, and of all.

    Raises:
        ConfigError: the folder is in use, or the model is of no known family.
        CheckpointError: it cannot be written; no space, for example.
    """
    folder = Path(folder).expanduser().absolute()
    tensors = _tensors(spec, params)
    pages = _pages(spec, tensors[0].dtype.name, tokenizer)
    partial = folder.parent / f".{folder.name}.partial"
    with explained(folder):
        require_room(folder, sum(tensor.nbytes for tensor in tensors))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            index = _write_tensors(
                partial, spec, params, tensors, shard_bytes, on_progress
            )
            if index is not None:
                pages["model.safetensors.index.json"] = json.dumps(index, indent=2)
            for name, text in pages.items():
                (partial / name).write_text(text, encoding="utf-8")
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _tensors(
    spec: ModelSpec, params: Mapping[str, jax.Array | np.ndarray]
) -> list[_Tensor]:
    """Every tensor, a parameter's layers one after another."""
    if spec.lora is not None:
        raise ConfigError(
            f"model {spec.name} has LoRA factors, which a model's folder cannot hold: "
            "merge them first, or export the adapter alone."
        )
    tensors = []
    for entry in weight_map(spec, architecture_of(spec)):
        param = params[entry.path]
        assert param.shape == entry.shape(spec), (entry, param.shape)
        dtype = np.dtype(param.dtype)
        if dtype not in DTYPES.values():
            raise CheckpointError(
                f"parameter {entry.path} is {dtype}; only float32, float16 and "
                "bfloat16 can be exported."
            )
        if isinstance(param, jax.Array) and not param.is_fully_addressable:
            raise CheckpointError(
                f"parameter {entry.path} lies on devices of other processes, too; "
                "export the checkpoint from one process."
            )
        shape = entry.foreign_shape(spec)
        for name, place in tensors_of(entry, spec):
            tensors.append(_Tensor(name, shape, dtype, entry, place))
    return tensors


def _arrays(
    spec: ModelSpec,
    params: Mapping[str, jax.Array | np.ndarray],
    tensors: list[_Tensor],
) -> Iterator[tuple[_Tensor, np.ndarray]]:
    """Tensors in Hugging Face's layout; each layer is fetched once."""
    fetched, here = None, np.empty(0)
    for tensor in tensors:
        entry, layer = tensor.entry, tensor.place[:1]
        if fetched != (entry.path, layer):
            here = _fetch(params[entry.path], *layer)
            fetched = (entry.path, layer)
        yield tensor, _to_foreign(entry, spec, here[tensor.place[1:]])


def _to_foreign(entry: Entry, spec: ModelSpec, ours: np.ndarray) -> np.ndarray:
    order = [entry.ours.index(letter) for letter in "".join(entry.theirs)]
    turned = ours.transpose(order)
    if not turned.flags.c_contiguous:
        turned = np.empty(turned.shape, ours.dtype)
        turn(ours.transpose(order), turned)
    return turned.reshape(entry.foreign_shape(spec))


def _fetch(param: jax.Array | np.ndarray, layer: int | None = None) -> np.ndarray:
    """One layer of a stacked parameter, or a whole one, as a host array."""
    if isinstance(param, np.ndarray):
        return param if layer is None else param[layer]
    shards = [one for one in param.addressable_shards if not one.replica_id]
    if layer is None and len(shards) == 1:
        return np.asarray(shards[0].data)  # a CPU's memory itself
    out = np.empty(param.shape if layer is None else param.shape[1:], param.dtype)
    for shard in shards:
        if layer is None:
            out[shard.index] = np.asarray(shard.data)
            continue
        first, stop, _ = shard.index[0].indices(param.shape[0])
        if first <= layer < stop:
            # Indexed on the device: from an accelerator comes one layer, not all.
            out[shard.index[1:]] = np.asarray(_layer(shard.data, layer - first))
    return out


@jax.jit
def _layer(stacked: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stacked, layer, keepdims=False)


def _write_tensors(
    folder: Path,
    spec: ModelSpec,
    params: Mapping[str, jax.Array | np.ndarray],
    tensors: list[_Tensor],
    shard_bytes: int,
    on_progress: Progress | None,
) -> dict[str, Any] | None:
    """Write the files; return the index, None for a single one."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    shards = _shards(tensors, shard_bytes)
    count = len(shards)
    places: dict[str, str] = {}
    arrays = _arrays(spec, params, tensors)
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{count:05d}.safetensors"
        name = "model.safetensors" if count == 1 else name
        with (folder / name).open("wb") as file:
            file.write(header_bytes((one.name, one.dtype, one.shape) for one in shard))
            for tensor in shard:
                wanted, array = next(arrays)
                assert wanted == tensor, (wanted, tensor)
                file.write(array.reshape(-1).view(np.uint8).data)
                places[tensor.name] = name
                done += tensor.nbytes
                if on_progress is not None:
                    on_progress(done, total)
    if count == 1:
        return None
    return {"metadata": {"total_size": total}, "weight_map": places}


def _shards(tensors: list[_Tensor], shard_bytes: int) -> list[list[_Tensor]]:
    shards: list[list[_Tensor]] = [[]]
    room = shard_bytes
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(tensor)
        room -= tensor.nbytes
    return shards


def _pages(spec: ModelSpec, dtype: str, tokenizer: Tokenizer) -> dict[str, str]:
    """The folder's texts: name -> content."""
    # Null, where transformers would take its own family's numbers.
    marks = {
        "bos_token_id": tokenizer.marks.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": None,
    }
    stops = sorted(tokenizer.marks.stop_ids)
    generation = {**marks, "eos_token_id": stops if len(stops) > 1 else stops[0]}
    config = {**config_of(spec), **marks, "dtype": dtype, "_name_or_path": spec.name}
    return {
        **tokenizer.files(),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "config.json": json.dumps(config, indent=2) + "\n",
    }
