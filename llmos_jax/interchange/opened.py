"""Open somebody else's model as if it were a checkpoint of ours."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Sharding

from llmos_jax.data import Tokenizer
from llmos_jax.errors import CheckpointError
from llmos_jax.interchange.archive import Archive
from llmos_jax.interchange.families import spec_of
from llmos_jax.interchange.huggingface import HuggingFaceFolder, read_config
from llmos_jax.interchange.load import load_params, stored_dtypes
from llmos_jax.interchange.progress import ByteProgress
from llmos_jax.ir import ModelSpec
from llmos_jax.models import Params, Skeleton, skeleton


class OpenedArchive:
    """A foreign model that says what it is; arrays are read when asked for.

    It has the face of `checkpoint.OpenedCheckpoint`.
    """

    step = 0
    config_path: Path | None = None

    def __init__(self, archive: Archive):
        self.archive = archive
        self.skeleton: Skeleton = skeleton(_spec(archive.config, archive.path))

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """That goes with the weights; read when first asked for.

        Raises:
            CheckpointError: there is none, or none that can be read.
        """
        return self.archive.tokenizer()

    def params(
        self, shardings: dict[str, Sharding] | None = None, *, dtype: str | None = None
    ) -> Params:
        """Read parameters onto `shardings` (by path; only those), or all of them onto
        the first device.

        Args:
            shardings: of what is wanted.
            dtype: to cast to; None keeps what is stored.

        Raises:
            CheckpointError: tensors missing, extra, damaged, or not the config's.
        """
        is_first = jax.process_index() == 0
        with ByteProgress(f"reading {self.archive.path}", enabled=is_first) as bar:
            return load_params(
                self.archive,
                self.skeleton,
                shardings,
                dtype=dtype,
                on_progress=bar.update,
            )


def is_foreign(path: str | Path) -> bool:
    """Whether this is the name of a Hugging Face folder, or of a GGUF file."""
    path = Path(path).expanduser()
    return path.suffix == ".gguf" or (path / "config.json").is_file()


def open_archive(path: str | Path) -> OpenedArchive:
    """Open a Hugging Face folder or a GGUF file.

    Raises:
        CheckpointError: neither of them, or damaged.
        ConfigError: a model with features that we do not have.
    """
    path = _existing(path)
    if path.is_dir():
        _spec(read_config(path), path)  # a foreign kind of model is refused as such
    return OpenedArchive(_archive(path))


def foreign_spec(path: str | Path) -> ModelSpec:
    """Return what model lies there, reading no tensor and no tokenizer.

    Raises:
        CheckpointError: none, or damaged.
        ConfigError: a model with features that we do not have.
    """
    path = _existing(path)
    config = read_config(path) if path.is_dir() else _archive(path).config
    return _spec(config, path)


def _existing(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if not path.exists():
        raise CheckpointError(f"there is no {path}.")
    if not is_foreign(path):
        raise CheckpointError(
            f"{path} is neither a Hugging Face folder (it has no config.json) nor a "
            "*.gguf file."
        )
    return path


def _archive(path: Path) -> Archive:
    if path.is_dir():
        return HuggingFaceFolder(path)
    from llmos_jax.interchange.gguf_file import GgufFile

    return GgufFile(path)


def inspect(path: str | Path) -> dict[str, Any]:
    """What a foreign model holds, as plain figures; every tensor is checked by name,
    shape and dtype, and none is read.

    Raises:
        CheckpointError: damaged, or tensors missing or extra.
        ConfigError: a model with features that we do not have.
    """
    opened = open_archive(path)
    archive, spec = opened.archive, opened.skeleton.spec
    dtypes = sorted(set(stored_dtypes(archive, spec).values()))
    return {
        "checkpoint": str(archive.path),
        "model": spec.name,
        "architecture": spec.architecture,
        "params": opened.skeleton.table.num_params,
        "dtypes": ", ".join(dtypes),
        "tensors": len(archive.tensors),
        "bytes": sum(facts.stored_bytes for facts in archive.tensors.values()),
        "vocabulary": opened.tokenizer.vocab_size,
        "chat_template": opened.tokenizer.marks.chat_template is not None,
    }


def _spec(config: dict[str, Any], path: Path) -> ModelSpec:
    """The model, named as it names itself, or as its folder or file is."""
    whole = path.absolute()
    own = config.get("_name_or_path") or config.get("_model_name_or_path")
    named = str(own).rstrip("/").split("/")[-1] if own else ""
    fallback = whole.stem if whole.is_file() else whole.name
    return spec_of(config, re.sub(r"[^A-Za-z0-9.]+", "_", named).lower() or fallback)
