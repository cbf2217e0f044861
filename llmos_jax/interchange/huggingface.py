"""Read a Hugging Face folder: config.json, safetensors files and a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from llmos_jax.data import Tokenizer, tokenizer_of_folder
from llmos_jax.errors import CheckpointError, ConfigError
from llmos_jax.interchange.archive import TensorFacts
from llmos_jax.interchange.safetensors_file import Stored, read_header, read_rows
from llmos_jax.telemetry import log

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Gemma 3 with vision: as hub files (and transformers 5) have the text model's names,
# and as transformers 5 has them in memory.
_TEXT_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)
_VISION_PREFIXES = ("vision_tower.", "multi_modal_projector.")


class HuggingFaceFolder:
    """An Archive in a folder."""

    def __init__(self, path: str | Path):
        """Read config.json and the headers of all files; no tensor yet.

        Raises:
            CheckpointError: something is missing or damaged; the file is named.
        """
        self._path = Path(path).expanduser()
        self._config = _read_json(self._path / "config.json", "a model's folder")
        found = _find(self._path)
        renamed = {_text_name(name): where for name, where in found.items()}
        if len(renamed) != len(found):
            raise CheckpointError(
                f"{self._path} holds the same tensor under two names, with and "
                "without a language_model prefix."
            )
        self._where = {
            name: where for name, where in renamed.items() if not _is_vision(name)
        }
        if len(self._where) < len(renamed):
            log(
                f"{self._path}: {len(renamed) - len(self._where)} tensors of the "
                "vision model are left out; only text goes through this model"
            )
        self._tensors = {
            name: stored.facts for name, (_, stored) in self._where.items()
        }

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def config(self) -> dict[str, Any]:
        """config.json, as it is."""
        return dict(self._config)

    @property
    def tensors(self) -> Mapping[str, TensorFacts]:
        """By name, of the text model; kinds that are no weights keep their name."""
        return MappingProxyType(self._tensors)

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Return a tensor, or some of its first dimension, in memory of its own.

        Raises:
            CheckpointError: the file ends early, or what it holds is no such tensor.
        """
        if name not in self._where:
            raise CheckpointError(f"{self._path} has no tensor {name}.")
        file, stored = self._where[name]
        if self._tensors[name].dtype == stored.dtype:
            raise CheckpointError(
                f"{file}: {name} is stored as {stored.dtype}; float32, float16 and "
                "bfloat16 can be read."
            )
        return read_rows(file, name, stored, rows)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of the folder.

        Raises:
            CheckpointError: there is none, or none that can be read.
        """
        try:
            return tokenizer_of_folder(self._path)
        except ConfigError as problem:
            raise CheckpointError(f"{self._path}: {problem}") from None


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a folder, and open no other file.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return _read_json(path / "config.json", "a model's folder")


def _find(folder: Path) -> dict[str, tuple[Path, Stored]]:
    """Every tensor of the folder's files, and where it lies."""
    if (folder / _SINGLE).is_file():
        file = folder / _SINGLE
        return {name: (file, stored) for name, stored in read_header(file).items()}
    if (folder / _INDEX).is_file():
        return _find_by_index(folder)
    pickled = sorted(
        file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth")
    )
    if pickled:
        raise CheckpointError(
            f"{folder} holds its weights as {pickled[0]}, which is a Python pickle and "
            "may run code; it is not read. Convert it to safetensors: load it with "
            "transformers and save_pretrained it again."
        )
    raise CheckpointError(f"{folder} has no {_SINGLE} and no {_INDEX}.")


def _find_by_index(folder: Path) -> dict[str, tuple[Path, Stored]]:
    index = folder / _INDEX
    places = _read_json(index, "an index").get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise CheckpointError(
            f"{index} is damaged: its weight_map should give the file beside it of "
            "each tensor."
        )
    files = sorted(set(places.values()))
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names files that are not there: {_some(missing)}. Fetch them."
        )
    headers = {file: read_header(folder / file) for file in files}
    absent = [f"{name} ({f})" for name, f in places.items() if name not in headers[f]]
    if absent:
        raise CheckpointError(
            f"{index} names tensors that their files do not hold: {_some(absent)}."
        )
    return {name: (folder / file, headers[file][name]) for name, file in places.items()}


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise CheckpointError(
            f"{path} cannot be read: {problem.strerror}. It belongs to {what}."
        ) from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not JSON.") from None
    if not isinstance(page, dict):
        raise CheckpointError(f"{path} is damaged: it is not a JSON object.")
    return page


def _text_name(name: str) -> str:
    for theirs, plain in _TEXT_PREFIXES:
        if name.startswith(theirs):
            return plain + name.removeprefix(theirs)
    return name


def _is_vision(name: str) -> bool:
    return name.removeprefix("model.").startswith(_VISION_PREFIXES)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(names[:10]) + more
